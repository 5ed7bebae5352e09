"""Weights of 8 and 4 bits: gradients of the very weights that are used, and clear words where there are none."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from attribute import AttributionError, IndexConfig, ModelError, _quantised
from attribute.model import LanguageModel, load_model
from gradcore import CapturePlan

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for blocks of 64 weights."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, max_position_embeddings=48, **sizes))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("wide") / "llama"
    model.save_pretrained(path)
    return str(path)


def gradients(model: LanguageModel, plan: CapturePlan) -> torch.Tensor:
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.enable_grad(), model.collector(plan) as collector:
        model.losses(ids, ids).sum().backward()
        return collector.take().float().clone()


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")  # bitsandbytes and accelerate have their own to say on a CPU
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_gradients_are_those_of_the_quantised_weights(folder, precision):
    model, exact = load_model(folder, precision=precision, device="cpu"), load_model(folder, device="cpu")
    config = IndexConfig(projection_dim=0)
    plan, reference = model.plan(config), exact.plan(config)
    assert plan.slices == reference.slices
    before = gradients(exact, reference)
    for each in reference.modules:
        weight = exact.module(each.path).get_parameter("weight")
        weight.data.copy_(rounded(weight.data, precision))
    found, expected = gradients(model, plan), gradients(exact, reference)
    near = torch.nn.functional.cosine_similarity(found, expected)
    assert (near > torch.nn.functional.cosine_similarity(found, before)).all()
    assert (near > 0.99).all()


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_inputs_with_outliers_have_gradients_in_int8(folder, tmp_path):
    """LLM.int8 sets entries of 6 and more to zero in the input that three projections share, and puts them back."""
    import transformers as hf

    whole = hf.LlamaForCausalLM.from_pretrained(folder)
    whole.model.layers[0].input_layernorm.weight.data[:3] = 20.0
    whole.save_pretrained(tmp_path / "outliers")
    model, exact = (load_model(str(tmp_path / "outliers"), precision=each, device="cpu") for each in ("int8", "fp32"))
    config = IndexConfig(projection_dim=0)
    plan, reference = model.plan(config), exact.plan(config)
    for each in reference.modules:
        weight = exact.module(each.path).get_parameter("weight")
        weight.data.copy_(rounded(weight.data, "int8"))
    found, expected = gradients(model, plan), gradients(exact, reference)
    assert (torch.nn.functional.cosine_similarity(found, expected) > 0.98).all()


def rounded(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """What is left of a weight: 127 steps of its row's largest, or the nearest of NF4's sixteen numbers in a block."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if precision == "int4":
        return dequantize_4bit(*quantize_4bit(weight.bfloat16(), quant_type="nf4")).float()
    step = weight.half().float().abs().amax(1, keepdim=True) / 127
    return (weight.half().float() / step).round() * step


def test_without_bitsandbytes_the_way_to_it_is_told(folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_quantised, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(
        ModelError, match=r"--precision int4 needs bitsandbytes: uv pip install 'attribute\[quantised\]'"
    ):
        load_model(folder, precision="int4")


def test_quantised_weights_are_not_spread():
    with pytest.raises(AttributionError, match="bf16, or int8 without --fsdp"):
        IndexConfig(precision="int8", fsdp=True)
