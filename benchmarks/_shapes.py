"""Models of known shapes with the texts they are run on: random weights, or those of the assets."""

from __future__ import annotations

from _setup import articles, assets

NEOX = {"pythia-14m": (128, 6, 4), "pythia-70m": (512, 6, 8)}
TRAINED = {
    "llama-stories260k": ("llama-stories260k", "tinystories-0.9mb.txt"),
    "gpt2-shakespeare": ("gpt2-shakespeare/run0", "tinyshakespeare.txt"),
}
SHAPES = (*NEOX, "gpt2-small", *TRAINED)


def model_of(shape: str):
    """The model in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    if shape in TRAINED:
        return AutoModelForCausalLM.from_pretrained(str(assets() / TRAINED[shape][0])).eval()
    if shape == "gpt2-small":
        return GPT2LMHeadModel(GPT2Config()).eval()
    width, layers, heads = NEOX[shape]
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=2048,
            rotary_pct=0.25,
        )
    ).eval()


def tokenizer_file(shape: str) -> str:
    """Its tokenizer.json."""
    if shape in TRAINED:
        return str(assets() / TRAINED[shape][0] / "tokenizer.json")
    return str(assets() / "tokenizers" / ("gpt2" if shape == "gpt2-small" else "gpt-neox-20b") / "tokenizer.json")


def texts_of(shape: str, documents: int) -> list[str]:
    """Whole stories, lines of plays in pieces of about 64 tokens, or WikiText articles."""
    if shape == "llama-stories260k":
        text = (assets() / "text" / TRAINED[shape][1]).read_text(encoding="utf-8")
        return [part.strip() for part in text.split("\n") if len(part) > 20][:documents]
    if shape == "gpt2-shakespeare":
        text = (assets() / "text" / TRAINED[shape][1]).read_text(encoding="utf-8")
        return [text[at : at + 150] for at in range(0, 150 * documents, 150)]
    return articles(documents)


def token_ids(shape: str, documents: int, length: int) -> list[list[int]]:
    """Of each document, cut to ``length`` and the model's context."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file(shape))
    length = min(length, {"gpt2-shakespeare": 64, "llama-stories260k": 512}.get(shape, 1024))
    found = [tokenizer.encode(text).ids[:length] for text in texts_of(shape, documents)]
    return [each for each in found if len(each) > 1]
