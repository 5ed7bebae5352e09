"""Weights of 8 and 4 bits: gradients of the very weights that are used, and clear words where there are none."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from attribute import AttributionError, IndexConfig, ModelError, _quantised
from attribute.model import LanguageModel, load_model
from gradcore import CapturePlan

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.fixture(scope="module")
def folder(save_model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_model(tmp_path_factory.mktemp("wide") / "llama", "llama")


def gradients(model: LanguageModel, plan: CapturePlan) -> torch.Tensor:
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.enable_grad(), model.collector(plan) as collector:
        model.losses(ids, ids).sum().backward()
        return collector.take().float().clone()


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")  # bitsandbytes and accelerate have their own to say on a CPU
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_gradients_are_those_of_the_quantised_weights(folder, precision):
    import bitsandbytes

    model, exact = load_model(str(folder), precision=precision, device="cpu"), load_model(str(folder), device="cpu")
    config = IndexConfig(projection_dim=0)
    plan = model.plan(config)
    assert [each.name for each in plan.modules] == [each.name for each in exact.plan(config).modules]
    before = gradients(exact, exact.plan(config))
    replaced = 0
    for name, module in model.base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt | bitsandbytes.nn.Linear4bit):
            weight = exact.base.get_submodule(name).weight
            weight.data.copy_(dequantised(module))
            replaced += 1
    assert replaced == len(plan.modules)
    found, expected = gradients(model, plan), gradients(exact, exact.plan(config))
    near = torch.nn.functional.cosine_similarity(found, expected)
    assert (near > torch.nn.functional.cosine_similarity(found, before)).all()
    assert (near > 0.99).all()


def dequantised(module: Any) -> torch.Tensor:
    import bitsandbytes

    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    stored = module.state.CB if module.state.CB is not None else module.weight.CB
    return stored.float() * scale.float()[:, None] / 127


def test_without_bitsandbytes_the_way_to_it_is_told(folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_quantised, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(
        ModelError, match=r"--precision int4 needs bitsandbytes: uv pip install 'attribute\[quantised\]'"
    ):
        load_model(str(folder), precision="int4")


def test_quantised_weights_are_not_spread():
    with pytest.raises(AttributionError, match="bf16, or int8 without --fsdp"):
        IndexConfig(precision="int8", fsdp=True)
