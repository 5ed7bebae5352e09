"""LoRA and quantised layers as their libraries have them: adapters alone, and gradients of what is not stored whole."""

from __future__ import annotations

import pytest
import torch
from gradcore_reference import relative
from torch import Tensor, nn

from gradcore import CaptureError, CapturePlan, GradientCollector, TwoSided, coverage


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_lora_adapters_have_the_gradients_of_autograd():
    peft, hf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(hf.LlamaForCausalLM(config), lora).eval()
    ids = torch.arange(14).view(2, 7)
    plan = CapturePlan.for_model(model, "*lora_[AB].default")
    assert len(plan.modules) == 8
    with GradientCollector(model, plan) as collector:
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    for row in range(2):
        model.zero_grad()
        model(input_ids=ids[row : row + 1], use_cache=False).logits.square().sum().backward()
        for name, found in collector.gradients.items():
            assert relative(found[row], model.get_submodule(name).weight.grad) < 1e-4, name
    report = coverage(model, plan)
    assert report.captured == sum(model.get_submodule(each.name).weight.numel() for each in plan.modules)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


class Quantised(nn.Linear):
    """As bitsandbytes has them: an ``nn.Linear`` by class, whose weight is kept in 8 bits with a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


@pytest.mark.parametrize("sketch", [None, TwoSided(3)])
def test_a_quantised_linear_has_the_gradient_of_the_weight_it_stands_for(sketch):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))
    small = nn.Sequential(Quantised(whole[0]), nn.Tanh(), Quantised(whole[2]))
    for each, quantised in ((whole[0], small[0]), (whole[2], small[2])):
        each.weight.data = quantised.weight.float() * quantised.scale
    x, rows = torch.randn(3, 2, 6), []
    for model in (whole, small):
        with GradientCollector(model, CapturePlan.for_model(model, sketch=sketch)) as collector:
            model(x).square().sum().backward()
        rows.append(collector.rows.clone())
    torch.testing.assert_close(rows[1], rows[0])
    assert coverage(small, CapturePlan.for_model(small)).share == 1
    assert small[0].weight.dtype == torch.int8


class Restoring(Quantised):
    """As LLM.int8: outliers of the input are zero while the rest is rounded, and are put back."""

    def forward(self, x: Tensor) -> Tensor:
        outliers = x.abs() > 1
        kept = x[outliers].clone()
        with torch.no_grad():
            x[outliers] = 0
            x[outliers] = kept
        return super().forward(x)


class Pair(nn.Module):
    """Two layers of one input."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.factor = first, second, 1.0

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        with torch.no_grad():
            x.mul_(self.factor)
        return first + self.second(x)


def test_an_input_that_a_quantised_layer_restores_is_unchanged():
    torch.manual_seed(0)
    linears, x = [nn.Linear(6, 5, bias=False) for _ in range(2)], 2 * torch.randn(3, 2, 6)
    model = Pair(linears[0], Restoring(linears[1]))  # an adapter beside a quantised layer is whole
    with GradientCollector(model, CapturePlan.for_model(model)) as collector:
        model(x.clone()).square().sum().backward()
    model.factor = 2.0
    collecting = GradientCollector(model, CapturePlan.for_model(model))
    with pytest.raises(CaptureError, match="first was changed in place"), collecting:
        model(x.clone()).square().sum().backward()
    expected = torch.einsum("nso,nsi->noi", 2 * (linears[0](x) + model.second(x)), x)
    torch.testing.assert_close(collector.gradients["first"], expected)


def test_of_layers_that_are_whole_a_write_is_a_change():
    model = Pair(nn.Linear(6, 5), nn.Linear(6, 5))
    collecting = GradientCollector(model, CapturePlan.for_model(model))
    with pytest.raises(CaptureError, match="first was changed in place"), collecting:
        model(torch.randn(3, 2, 6)).square().sum().backward()
