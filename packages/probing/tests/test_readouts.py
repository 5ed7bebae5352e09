"""Readouts are what the model really adds to its residual stream, on every kind of model, in fp32 and bf16."""

import pytest
import torch
import transformers as tf
import zoo
from torch import nn

from probing import ConfigError, Readout, ReadoutError, ResidualUpdateModel, ResidualUpdateModelConfig
from probing._structure import example_inputs, find_blocks
from probing._tensors import first_tensor, replace_first_tensor

KINDS = list(zoo.ZOO)
CROSS = {"t5"}

# Written by hand from each architecture's source: the module whose output is the update. The package never sees it.
BY_HAND = {
    "bert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "roberta": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "mpnet": ("encoder.layer.{}.attention.attn.o", "encoder.layer.{}.output.dense"),
    "convbert": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "ernie": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "electra": ("encoder.layer.{}.attention.output.dense", "encoder.layer.{}.output.dense"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "gpt_neo": ("transformer.h.{}.attn.attention.out_proj", "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "vit": ("layers.{}.attention.o_proj", "layers.{}.mlp.fc2"),
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "mistral": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "qwen2": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "qwen3": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gemma": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gemma2": ("model.layers.{}.post_attention_layernorm", "model.layers.{}.post_feedforward_layernorm"),
    "gemma3": ("model.layers.{}.post_attention_layernorm", "model.layers.{}.post_feedforward_layernorm"),
    "opt": ("model.decoder.layers.{}.self_attn.out_proj", "model.decoder.layers.{}.fc2"),
    "bloom": ("transformer.h.{}.self_attention.dense", "transformer.h.{}.mlp.dense_4h_to_h"),
    "t5": ("decoder.block.{}.layer.0.SelfAttention.o", "decoder.block.{}.layer.2.DenseReluDense.wo"),
}


def everything(kind: str, dtype=torch.float32):
    model = zoo.make(kind, dtype)
    config = ResidualUpdateModelConfig(
        "auto", [0, 1], mlp=True, attn=True, stream=True, resid=True, cross=kind in CROSS, blocks=zoo.BLOCKS.get(kind)
    )
    hooked = ResidualUpdateModel(config, model)
    batch = example_inputs(model, rows=3, positions=5)
    with torch.no_grad():
        hooked(**batch)
    return model, hooked, batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_sum_comes_out(kind, dtype):
    model, hooked, _ = everything(kind, dtype)
    cache, eps = hooked.vector_cache, torch.finfo(dtype).eps
    for layer in (0, 1):
        x, a, b, y = (cache[f"{k}_{layer}"].float() for k in ("resid_in", "attn_update", "mlp_update", "resid_out"))
        middle = cache[f"attn_stream_{layer}"].float()
        assert min(a.abs().amax(), b.abs().amax()) > 1e-3
        scale = 8 * eps * (x.abs() + a.abs() + b.abs() + y.abs())
        if kind in zoo.POST_NORM:
            layout = hooked.layouts[layer]
            norm = model.get_submodule(str(layout.middle))
            assert isinstance(norm, nn.LayerNorm)
            torch.testing.assert_close(norm((x + a).to(dtype)).float(), middle, rtol=8 * eps, atol=16 * eps)
            assert (y.mean(-1).abs() < 0.05).all()  # the stream behind a fresh LayerNorm is centred
        else:
            total = x + a + b + (cache[f"cross_update_{layer}"].float() if kind in CROSS else 0)
            assert ((total - y).abs() <= scale).all()
            assert ((middle - x - a).abs() <= scale).all()
        assert torch.equal(cache[f"resid_mid_{layer}"], cache[f"attn_stream_{layer}"])
        assert torch.equal(cache[f"resid_out_{layer}"], cache[f"mlp_stream_{layer}"])
    assert torch.equal(cache["resid_out_0"], cache["resid_in_1"])


@pytest.mark.parametrize("kind", BY_HAND)
def test_updates_equal_those_of_a_hand_written_table(kind):
    model, hooked, batch = everything(kind)
    for layer in (0, 1):
        for key, template in zip(("attn_update", "mlp_update"), BY_HAND[kind]):
            seen = []
            module = model.get_submodule(template.format(layer))
            handle = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            with torch.no_grad():
                model(**batch)
            handle.remove()
            found = hooked.vector_cache[f"{key}_{layer}"]
            assert torch.equal(found, seen[0].reshape(found.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_regression_stream_readouts_keep_the_batch_axis(kind):
    """On current transformers NeuroSurgeon's GPT-2 and GPT-NeoX stream readouts keep example 0 only."""
    _, hooked, batch = everything(kind)
    rows = next(iter(batch.values())).shape[0]
    assert {vector.shape[0] for vector in hooked.vector_cache.values()} == {rows}
    assert {vector.ndim for vector in hooked.vector_cache.values()} == {3}


def test_regression_neox_attn_stream_is_block_input_plus_update_in_parallel_blocks():
    """There NeuroSurgeon reads a list that does not exist."""
    _, hooked, _ = everything("gpt_neox")
    cache = hooked.vector_cache
    torch.testing.assert_close(cache["attn_stream_1"], cache["resid_in_1"] + cache["attn_update_1"])


def test_the_wrapped_model_keeps_no_hook_and_its_outputs():
    model = zoo.make("gpt2")
    batch = example_inputs(model)
    before = model(**batch).logits
    hooked = ResidualUpdateModel(ResidualUpdateModelConfig("gpt", [0], mlp=True, attn=True), model)
    assert torch.equal(hooked(**batch).logits, before)
    assert torch.equal(hooked(batch["input_ids"]).logits, before)  # positional calls, too
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_readouts_keep_their_graph_and_train_returns_the_model():
    model = zoo.make("llama")
    hooked = ResidualUpdateModel(ResidualUpdateModelConfig("llama", [1], mlp=True), model)
    assert hooked.train() is hooked
    assert hooked.eval() is hooked
    hooked(**example_inputs(model))
    hooked.vector_cache["mlp_update_1"].sum().backward()
    assert model.get_submodule("model.layers.0.mlp.down_proj").weight.grad is not None


def test_the_check_leaves_training_flags_alone():
    model = zoo.make("gpt2").train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    ResidualUpdateModel(ResidualUpdateModelConfig("gpt", [0, 1], attn=True), model)
    assert [module.training for module in model.modules()] == flags


def test_cache_holds_the_seeds_keys():
    _, hooked, _ = everything("gpt2")
    config = ResidualUpdateModelConfig(
        model_type="gpt", target_layers=[1], mlp=True, attn=True, updates=True, stream=True
    )
    assert config.keys() == ["attn_update_1", "attn_stream_1", "mlp_update_1", "mlp_stream_1"]
    assert set(config.keys()) <= set(hooked.vector_cache)


def test_head_outputs_are_the_projections_input_by_head():
    model = zoo.make("qwen3")  # 4 heads of 6, not of 16 / 4
    hooked = ResidualUpdateModel(ResidualUpdateModelConfig("qwen3", [1], attn=True, heads=True), model)
    hooked(**example_inputs(model, rows=3, positions=5))
    heads = hooked.vector_cache["head_output_1"]
    assert heads.shape == (3, 5, 4, 6)
    projection = model.get_submodule("model.layers.1.self_attn.o_proj")
    torch.testing.assert_close(projection(heads.flatten(-2)), hooked.vector_cache["attn_update_1"])


def test_convbert_heads_are_refused_because_a_convolution_shares_the_projection():
    config = ResidualUpdateModelConfig("bert", [0], attn=True, heads=True)
    with pytest.raises(ReadoutError, match="convolution"):
        ResidualUpdateModel(config, zoo.make("convbert"))


def test_a_model_that_scales_its_updates_is_refused():
    """Granite multiplies updates before adding: taking the modules' outputs would be silently wrong."""
    torch.manual_seed(0)
    config = tf.GraniteConfig(**zoo._GQA, residual_multiplier=0.3)
    with pytest.raises(ReadoutError, match="add up to"):
        ResidualUpdateModel(ResidualUpdateModelConfig("auto", [0], attn=True), tf.GraniteForCausalLM(config).eval())


def test_a_plain_torch_model_works_from_an_example():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.feed = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x):
            x = x + self.attention(x)
            return x + self.feed(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    net, x = Net(), torch.randn(2, 3, 8)
    config = ResidualUpdateModelConfig(target_layers=[1], mlp=True, attn=True)
    hooked = ResidualUpdateModel(config, net, example={"x": x})
    hooked(x)
    assert hooked.vector_cache["mlp_update_1"].shape == (2, 3, 8)
    assert hooked.layouts[0].mlp == "blocks.1.feed"


class TestBadInput:
    def test_a_layer_the_model_lacks(self):
        with pytest.raises(ReadoutError, match=r"layer 7 does not exist.*0 to 1"):
            ResidualUpdateModel(ResidualUpdateModelConfig("gpt", [7], attn=True), zoo.make("gpt2"))

    def test_a_model_type_of_another_family(self):
        with pytest.raises(ConfigError, match=r"'gpt2'.*auto"):
            ResidualUpdateModel(ResidualUpdateModelConfig("bert", [0], attn=True), zoo.make("gpt2"))

    def test_two_stacks_of_blocks_need_a_choice(self):
        with pytest.raises(ReadoutError, match=r"encoder\.block.*decoder\.block"):
            find_blocks(zoo.make("t5"))

    def test_cross_attention_the_model_lacks(self):
        with pytest.raises(ReadoutError, match="no cross-attention"):
            ResidualUpdateModel(ResidualUpdateModelConfig("gpt", [0], cross=True), zoo.make("gpt2"))

    def test_a_key_that_names_nothing(self):
        with pytest.raises(ConfigError, match="attn_update"):
            Readout.parse("attn_output_1")

    def test_a_misspelt_option_names_its_neighbour(self):
        with pytest.raises(ConfigError, match="'target_layers'"):
            ResidualUpdateModelConfig("gpt", target_layer=[0])

    def test_nothing_to_remember(self):
        with pytest.raises(ConfigError, match="nothing to remember"):
            ResidualUpdateModelConfig("gpt", [0], attn=True, updates=False)


def test_config_survives_a_round_trip(tmp_path):
    """NeuroSurgeon's configs cannot be loaded again: the constructor refuses transformers_version."""
    config = ResidualUpdateModelConfig("gpt", [0, 3], mlp=True, stream=True, blocks="transformer.h")
    config.save_pretrained(tmp_path)
    again = ResidualUpdateModelConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.model_type == "gpt"


def test_first_tensor_takes_tensors_tuples_and_outputs_alike():
    t = torch.ones(2, 3)
    output = tf.modeling_outputs.BaseModelOutput(last_hidden_state=t)
    for value in (t, (t, None), [None, t], {"x": t}, output, ((t,), t)):
        assert first_tensor(value) is t
        assert torch.equal(first_tensor(replace_first_tensor(value, t * 2)), t * 2)
    assert first_tensor(torch.ones(2, dtype=torch.long)) is None
    assert isinstance(replace_first_tensor(output, t * 2), tf.modeling_outputs.BaseModelOutput)
