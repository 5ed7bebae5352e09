"""What went wrong in other libraries of the field, by name, and the ways of running a model that must not matter."""

from __future__ import annotations

import pytest
import torch
from gradcore_models import Conv1D
from gradcore_reference import planned_one_by_one
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gradcore import CapturePlan, GradientCollector, TwoSided, coverage

# float32 sums of a few dozen products: rounding is below 1e-6, a wrong term above 1e-2.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def collected(model: nn.Module, x: Tensor, plan: CapturePlan | None = None) -> dict[str, Tensor]:
    with GradientCollector(model, plan or CapturePlan.for_model(model)) as collector:
        model(x).square().sum().backward()
    return collector.gradients


def expected(model: nn.Module, x: Tensor, plan: CapturePlan) -> dict[str, Tensor]:
    return planned_one_by_one(model, lambda n: model(x[n : n + 1]).square().sum(), len(x), plan)


def assert_equals_autograd(model: nn.Module, x: Tensor, plan: CapturePlan) -> None:
    truth, found = expected(model, x, plan), collected(model, x, plan)
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], **CLOSE)


class QuantisedLinear(nn.Linear):
    """As in bitsandbytes: integers and a scale a row in a frozen parameter, a true product in the forward pass."""

    def __init__(self, full: nn.Linear) -> None:
        super().__init__(full.in_features, full.out_features, bias=False)
        scale = full.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((full.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def effective(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.effective().T


class LoRA(nn.Module):
    """An adapter around a frozen layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.lora_B(self.lora_A(x))


class TestShippedByOthers:
    """Bergson's changelog and issues: the number is theirs."""

    def test_346_the_scale_of_a_sketch_does_not_depend_on_the_shape(self):
        draws, ratios = 200, []
        for out, inside in ((4, 4), (4, 32)):
            gradient = torch.randn(out, inside)
            sketches = [TwoSided(8, seed=seed) for seed in range(draws)]
            norms = [
                (s.matrix("m", "left", out) @ gradient @ s.matrix("m", "right", inside).T).square().sum()
                for s in sketches
            ]
            ratios.append(float(torch.stack(norms).mean() / gradient.square().sum()))
        # E‖LGRᵀ‖² = ‖G‖²; one draw scatters by about 0.6, the mean of 200 by 0.04: four standard errors and a margin.
        assert all(abs(ratio - 1) < 0.2 for ratio in ratios), ratios

    def test_332_a_square_conv1d_is_not_transposed(self):
        model, x = nn.Sequential(Conv1D(4, 4)), torch.randn(3, 5, 4)
        assert_equals_autograd(model, x, CapturePlan.for_model(model))

    def test_348_layers_with_and_without_bias_stand_together(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 2))
        plan = CapturePlan.for_model(model, include_bias=True)
        assert plan.width == 6 * 5 + 5 * 6 + 2 * 6
        assert_equals_autograd(model, torch.randn(3, 2, 4), plan)

    def test_42_hooks_do_not_grow_with_the_batches(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        with GradientCollector(model, CapturePlan.for_model(model)) as collector:
            for _ in range(4):
                model(torch.randn(2, 3)).sum().backward()
                collector.take()
                assert all(len(model[i]._forward_hooks) == 1 for i in (0, 1))

    def test_318_what_is_not_captured_is_listed(self):
        model = nn.ModuleDict({"router": nn.Bilinear(2, 2, 3), "up": nn.Linear(2, 2, bias=False)})
        report = coverage(model, CapturePlan.for_model(model))
        assert (report.captured, report.total) == (4, 4 + 15)
        assert [(left.module, left.reason) for left in report.left_out] == [
            ("router", "Bilinear is not a captured layer type")
        ]

    def test_several_backward_passes_are_rows_not_columns(self):
        model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
        with GradientCollector(model, CapturePlan.for_model(model)) as collector:
            for part in x.split(1):
                model(part).square().sum().backward()
        torch.testing.assert_close(collector.gradients["0"], collected(model, x)["0"], **CLOSE)

    def test_four_dimensional_inputs_are_hooked(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        assert_equals_autograd(model, torch.randn(2, 3, 5, 3), CapturePlan.for_model(model, include_bias=True))

    def test_a_zero_gradient_is_zero_not_nan(self):
        model = nn.Sequential(nn.Linear(3, 2))
        with GradientCollector(model, CapturePlan.for_model(model, sketch=TwoSided(2))) as collector:
            (model(torch.randn(2, 3)) * 0).sum().backward()
        assert torch.equal(collector.rows, torch.zeros_like(collector.rows))


class TestUnusualModules:
    def test_frozen_modules_are_captured_and_stay_frozen(self):
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 3)
        plan = CapturePlan.for_model(model)
        truth = expected(model, x, plan)
        model.requires_grad_(False)
        for name, gradient in collected(model, x, plan).items():
            torch.testing.assert_close(gradient, truth[name], **CLOSE)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
    def test_a_parametrised_weight_yields_the_gradient_of_the_effective_weight(self, wrap):
        plain = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
        wrap(plain[0])
        same = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
        same[0].weight.data = plain[0].weight.detach().clone()
        same[2].load_state_dict(plain[2].state_dict())
        x = torch.randn(3, 4)
        truth = expected(same, x, CapturePlan.for_model(same))
        found = collected(plain, x)
        for name in truth:
            torch.testing.assert_close(found[name], truth[name], **CLOSE)

    def test_a_quantised_linear_yields_the_gradient_of_the_effective_weight(self):
        full = nn.Linear(5, 3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), QuantisedLinear(full))
        same = nn.Sequential(model[0], nn.Tanh(), nn.Linear(5, 3, bias=False))
        same[2].weight.data = model[2].effective()
        x = torch.randn(3, 2, 4)
        truth = expected(same, x, CapturePlan.for_model(same))
        found = collected(model, x, CapturePlan.for_model(model))
        for name in truth:
            torch.testing.assert_close(found[name], truth[name], **CLOSE)

    def test_coverage_says_that_a_parametrised_weight_is_the_effective_one(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3, bias=False)))
        report = coverage(model, CapturePlan.for_model(model))
        assert (report.captured, report.total) == (0, 12 + 3)
        assert all("effective weight" in left.reason for left in report.left_out)

    def test_a_weight_kept_as_a_buffer(self):
        model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(2, 4)
        truth = collected(model, x)["0"]
        weight = model[0].weight.detach()
        del model[0].weight
        model[0].register_buffer("weight", weight)
        torch.testing.assert_close(collected(model, x)["0"], truth, **CLOSE)

    def test_adapters_alone(self):
        model = nn.Sequential(LoRA(nn.Linear(4, 6)), nn.Tanh(), LoRA(nn.Linear(6, 3)))
        plan = CapturePlan.for_model(model, ["*.lora_A", "*.lora_B"])
        assert list(plan.shapes.values()) == [(2, 4), (6, 2), (2, 6), (3, 2)]
        assert_equals_autograd(model, torch.randn(3, 2, 4), plan)


class TestWaysOfRunning:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.block = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.block, self.first(x), use_reentrant=reentrant)

        model, x = Checkpointed(), torch.randn(3, 3)
        plan = CapturePlan.for_model(model)
        truth = expected(model, x, plan)
        if reentrant:
            # It runs the block without gradients first, which cannot be told from a mistake: refused, not wrong.
            with pytest.raises(Exception, match="gradients switched off"):
                collected(model, x, plan)
            return
        for name, gradient in collected(model, x, plan).items():
            torch.testing.assert_close(gradient, truth[name], **CLOSE)

    @pytest.mark.parametrize("work", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
    def test_activations_in_place(self, work):
        model = nn.Sequential(nn.Linear(3, 4), work(inplace=True), nn.Linear(4, 4), work(inplace=True), nn.Linear(4, 2))
        assert_equals_autograd(model, torch.randn(3, 2, 3), CapturePlan.for_model(model, include_bias=True))

    def test_autocast(self):
        model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(3, 5, 16)
        truth = collected(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            found = collected(model, x)
        for name in truth:
            # bfloat16 keeps 8 bits: 2⁻⁹ a factor, a few factors.
            assert (found[name].float() - truth[name]).norm() < 0.05 * truth[name].norm()

    def test_input_tensors_of_inference_mode(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        with torch.inference_mode():
            x = torch.randn(3, 3)
        truth = collected(model, x.clone())
        for name, gradient in collected(model, x).items():
            torch.testing.assert_close(gradient, truth[name], **CLOSE)

    # torch's own tracer looks at .grad of what the hook returns, and warns of itself.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
    def test_compiled(self):
        model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 3)
        truth = collected(model, x)
        compiled = torch.compile(model, backend="eager")
        compiled(x)  # hooks that come after the first call must be seen
        for name, gradient in collected(compiled, x).items():
            torch.testing.assert_close(gradient, truth[name.removeprefix("_orig_mod.")], **CLOSE)
