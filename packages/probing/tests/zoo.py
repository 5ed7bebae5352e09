"""Tiny random models of every kind the package names; all on current transformers, none from the hub."""

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = _SMALL | {"num_key_value_heads": 2, "head_dim": 6}
_MOE = _GQA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _gpt2(**more):
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=96, n_embd=16, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2, **more
        )
    )


ZOO = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**_SMALL)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**_SMALL)),
    "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**_SMALL)),
    "convbert": lambda: tf.ConvBertModel(tf.ConvBertConfig(**_SMALL, embedding_size=16, head_ratio=2)),
    "ernie": lambda: tf.ErnieModel(tf.ErnieConfig(**_SMALL)),
    "electra": lambda: tf.ElectraModel(tf.ElectraConfig(**_SMALL, embedding_size=16)),
    "gpt2": _gpt2,
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=96,
            hidden_size=16,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=40,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SMALL)),
    "gpt_neox_sequential": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SMALL, use_parallel_residual=False)),
    "vit": lambda: tf.ViTModel(
        tf.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4
        )
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GQA)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SMALL, num_key_value_heads=2)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GQA)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GQA)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GQA)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GQA)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=96,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=24,
            max_position_embeddings=40,
            word_embed_proj_dim=16,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
    "opt_postnorm": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=96,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=24,
            max_position_embeddings=40,
            word_embed_proj_dim=16,
            do_layer_norm_before=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_MOE, decoder_sparse_step=1)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_SMALL)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_SMALL)),
}
BLOCKS = {"t5": "decoder.block"}
POST_NORM = {"bert", "roberta", "mpnet", "convbert", "ernie", "electra", "opt_postnorm"}


def make(kind: str, dtype: torch.dtype = torch.float32):
    """A model with its weights drawn wide enough that no update hides under rounding."""
    torch.manual_seed(0)
    model = ZOO[kind]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.to(dtype)


def word_tokenizer(words, **special):
    """One token a word, split at spaces and punctuation."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_worded_gpt2(where, words, positions):
    """A random GPT-2 over these words, of which the first two are padding and unknown, with its tokenizer."""
    word_tokenizer(words, pad_token=words[0], unk_token=words[1]).save_pretrained(where)
    torch.manual_seed(0)
    shape = {"vocab_size": len(words), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions}
    tf.GPT2LMHeadModel(tf.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).save_pretrained(where)
