"""Models in the class that their readouts and answers need, with all weights that matter."""

import pytest
import torch
import transformers as tf
from zoo import _SMALL, make, word_tokenizer

from probing import ConfigError, DataError
from probing._load import Loaded, check_positions, find_source, load_model, require_next_token


@pytest.fixture
def saved(tmp_path):
    tokenizer = word_tokenizer(map(str, range(96)), unk_token="0")

    def save(model):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def loaded(folder, blocks=None, **how):
    return load_model(find_source(folder, blocks), **how)


def test_decoders_come_with_their_head_and_encoders_as_what_they_are(saved, caplog):
    for model, kind in [
        (make("gpt2"), "GPT2LMHeadModel"),
        (tf.GPT2Model(make("gpt2").config), "GPT2LMHeadModel"),
        (make("llama"), "LlamaForCausalLM"),
        (make("bert"), "BertModel"),
        (tf.BertForMaskedLM(tf.BertConfig(**_SMALL)), "BertForMaskedLM"),
        (tf.BertForSequenceClassification(tf.BertConfig(**_SMALL)), "BertForSequenceClassification"),
        (make("mpnet"), "MPNetModel"),
    ]:
        found = loaded(saved(model))
        assert type(found.model).__name__ == kind
        assert not found.random
        assert not found.model.training
    assert not caplog.records


def test_of_an_encoder_decoder_the_encoder_is_probed_when_asked_for(saved):
    folder = saved(make("t5"))
    with pytest.raises(ConfigError, match=r"t5 is an encoder-decoder: type --blocks encoder\.block .*from Python"):
        loaded(folder)
    with pytest.raises(ConfigError, match="from Python"):
        loaded(folder, "decoder.block")
    model = loaded(folder, "encoder.block").model
    ids = torch.randint(3, 96, (2, 5))
    with torch.no_grad():
        expected = make("t5").encoder(input_ids=ids).last_hidden_state
        assert torch.equal(model(input_ids=ids).last_hidden_state, expected)
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    folder = saved(tf.BartModel(tf.BartConfig(vocab_size=96, **shape)))
    with pytest.raises(ConfigError, match=r"bart is an encoder-decoder: A decoder with an encoder"):
        loaded(folder, "encoder.layers")


def without(model, *parts):
    kept = {name: tensor for name, tensor in model.state_dict().items() if not any(part in name for part in parts)}
    return {"state_dict": kept}


def test_weights_that_blocks_use_must_be_there_and_heads_need_not(tmp_path, saved):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL, tie_word_embeddings=False))
    folder = saved(model)
    model.save_pretrained(folder, **without(model, "lm_head"))
    found = loaded(folder)
    assert found.random == ["lm_head.weight"]
    with pytest.raises(ConfigError, match=r"lacks 1 weights of LlamaForCausalLM, such as lm_head\.weight.*at random"):
        require_next_token(found, folder)
    for part in ("layers.0.mlp", "embed_tokens"):
        model.save_pretrained(folder, **without(model, part))
        with pytest.raises(ConfigError, match=rf"lacks \d weights that its blocks use, such as model\.{part}"):
            loaded(folder)


def test_a_next_token_is_said_from_left_to_right():
    for kind in ("gpt2", "llama", "mixtral", "gemma2", "opt"):
        for dtype in (torch.float32, torch.bfloat16):
            require_next_token(Loaded(make(kind, dtype), []), kind)
    for dtype in (torch.float32, torch.bfloat16):
        model = tf.BertForMaskedLM(tf.BertConfig(**_SMALL)).eval().to(dtype)
        with pytest.raises(ConfigError, match="BertForMaskedLM looks ahead: a later token changes"):
            require_next_token(Loaded(model, []), "bert")
    for model in (
        tf.BertForSequenceClassification(tf.BertConfig(**_SMALL)),
        tf.BertForTokenClassification(tf.BertConfig(**_SMALL)),
        make("bert"),
    ):
        with pytest.raises(ConfigError, match=rf"{type(model).__name__} says no next token"):
            require_next_token(Loaded(model.eval(), []), "bert")


def test_precision_and_device_are_as_asked(saved):
    folder = saved(make("gpt2", torch.bfloat16))
    for precision, dtype in {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "auto": torch.bfloat16,
    }.items():
        assert loaded(folder, precision=precision, device="cpu").model.dtype == dtype
    with pytest.raises(ConfigError, match="device 'tpu9' cannot be used"):
        loaded(folder, device="tpu9")


def test_what_is_not_there_is_said(tmp_path, saved):
    with pytest.raises(ConfigError, match="there is no model folder"):
        find_source(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"the model .* cannot be loaded"):
        find_source(str(tmp_path))
    folder = tmp_path / "model"
    make("gpt2").save_pretrained(folder)
    with pytest.raises(ConfigError, match="tokenizer"):
        find_source(str(folder))


def test_the_context_is_the_configurations_and_roberta_keeps_some_positions(saved):
    assert find_source(saved(make("gpt2"))).context == 40
    assert find_source(saved(make("llama"))).context == 40
    assert find_source(saved(make("bloom"))).context is None
    model = make("roberta")  # 40 positions, of which those up to the padding token's number are not for text
    room = 40 - model.config.pad_token_id - 1
    with torch.no_grad():
        model(input_ids=torch.full((1, room), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, room + 1), 5))
    check_positions(model, [room], ["x"])
    with pytest.raises(DataError, match=rf"row 2: {room + 1} tokens, .*positions for {room}; type --max-length {room}"):
        check_positions(model, [3, room + 1], ["row 1", "row 2"])
