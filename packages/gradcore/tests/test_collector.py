"""Collected gradients are autograd's, whatever the batch, the padding or the order."""

from __future__ import annotations

import pytest
import torch
from gradcore_models import Conv1D, Reused, TinyLM
from gradcore_reference import one_by_one, relative
from torch import nn

from gradcore import CaptureError, CapturePlan, GradientCollector, Identity, TwoSided, per_example_loss

LENGTHS = (7, 3, 9, 2)
MATRICES = ["blocks.*.up", "blocks.*.down"]


@pytest.fixture
def language():
    model = TinyLM()
    ids = torch.randint(0, 23, (len(LENGTHS), max(LENGTHS)))
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(LENGTHS):
        labels[row, :length] = ids[row, :length]
    return model, ids, labels


def losses(model, ids, labels, **options):
    return per_example_loss(model.hidden(ids), model.head.weight, labels, **options)


def collect(model, plan, ids, labels):
    with GradientCollector(model, plan) as collector:
        losses(model, ids, labels, reduction=plan.reduction).sum().backward()
    return collector


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_equals_autograd_one_example_at_a_time(language, reduction):
    model, ids, labels = language
    plan = CapturePlan.for_model(model, MATRICES, reduction=reduction)
    found = collect(model, plan, ids, labels).gradients
    assert list(found) == NAMES

    def loss(row):
        part = labels[row : row + 1, : LENGTHS[row]]
        return losses(model, ids[row : row + 1, : LENGTHS[row]], part, reduction=reduction).sum()

    expected = one_by_one(model, loss, len(LENGTHS), NAMES)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entries", ["rademacher", "normal"])
def test_sketch_is_l_g_r_transposed(language, entries):
    model, ids, labels = language
    sketch = TwoSided(4, entries, seed=3)
    whole = collect(model, CapturePlan.for_model(model, MATRICES), ids, labels).gradients
    found = collect(model, CapturePlan.for_model(model, MATRICES, sketch=sketch), ids, labels).gradients
    for name in NAMES:
        left = sketch.matrix(name, "left", whole[name].shape[1])
        right = sketch.matrix(name, "right", whole[name].shape[2])
        torch.testing.assert_close(found[name], left @ whole[name] @ right.T, rtol=1e-5, atol=1e-6)


def test_batch_order_and_padding_do_not_matter(language):
    model, ids, labels = language
    plan = CapturePlan.for_model(model, MATRICES, sketch=TwoSided(4))
    together = collect(model, plan, ids, labels).rows
    backwards = collect(model, plan, ids.flip(0), labels.flip(0)).rows.flip(0)
    padded = collect(
        model, plan, nn.functional.pad(ids, (0, 5), value=11), nn.functional.pad(labels, (0, 5), value=-100)
    ).rows
    alone = torch.cat(
        [collect(model, plan, ids[r : r + 1, :n], labels[r : r + 1, :n]).rows for r, n in enumerate(LENGTHS)]
    )
    for other in (backwards, padded, alone):
        for row in range(len(LENGTHS)):
            assert relative(other[row], together[row]) < 1e-6


def test_closure_sees_the_same_gradients_and_nothing_is_kept(language):
    model, ids, labels = language
    plan = CapturePlan.for_model(model, MATRICES, sketch=TwoSided(4))
    expected = collect(model, plan, ids, labels).gradients
    seen = {}
    with GradientCollector(model, plan, seen.__setitem__) as collector:
        losses(model, ids, labels).sum().backward()
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in expected)
    with pytest.raises(CaptureError, match="closure took"):
        _ = collector.gradients


def test_several_backward_passes_follow_each_other(language):
    model, ids, labels = language
    plan = CapturePlan.for_model(model, MATRICES)
    whole = collect(model, plan, ids, labels).rows
    with GradientCollector(model, plan) as collector:
        for part in (slice(0, 1), slice(1, 4)):
            losses(model, ids[part], labels[part]).sum().backward()
        assert relative(collector.rows, whole) < 1e-6
        assert relative(collector.take(), whole) < 1e-6
        losses(model, ids, labels).sum().backward()
        assert relative(collector.take(), whole) < 1e-6


def test_take_reuses_its_buffer_and_shrinks_to_the_batch(language):
    model, ids, labels = language
    plan = CapturePlan.for_model(model, MATRICES)
    with GradientCollector(model, plan) as collector:
        losses(model, ids, labels).sum().backward()
        first = collector.take()
        expected = first[:2].clone()
        losses(model, ids[:2], labels[:2]).sum().backward()
        second = collector.take()
    assert second.data_ptr() == first.data_ptr()
    assert relative(second, expected) < 1e-6


def test_a_module_called_several_times_gets_the_sum():
    model = Reused()
    x = torch.randn(3, 4, 5)
    with GradientCollector(model, CapturePlan.for_model(model)) as collector:
        model(x).square().sum().backward()
    expected = one_by_one(model, lambda row: model(x[row : row + 1]).square().sum(), 3, ["layer"])
    torch.testing.assert_close(collector.gradients["layer"], expected["layer"], rtol=1e-5, atol=1e-6)


def test_two_dimensional_inputs_are_one_position_an_example():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    x = torch.randn(5, 4)
    with GradientCollector(model, CapturePlan.for_model(model)) as collector:
        model(x).square().sum().backward()
    expected = one_by_one(model, lambda row: model(x[row : row + 1]).square().sum(), 5, ["0", "2"])
    for name in ("0", "2"):
        torch.testing.assert_close(collector.gradients[name], expected[name], rtol=1e-5, atol=1e-6)


def test_keyword_calls_are_captured():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(input=x)

    model, x = Caller(), torch.randn(4, 3)
    with GradientCollector(model, CapturePlan.for_model(model)) as collector:
        model(x).sum().backward()
    torch.testing.assert_close(collector.gradients["layer"], x[:, None, :].expand(4, 2, 3))


def test_modules_that_are_not_reached_are_zero():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    with GradientCollector(model, CapturePlan.for_model(model)) as collector:
        model["used"](torch.randn(2, 3)).sum().backward()
    assert collector.gradients["unused"].abs().sum() == 0
    assert collector.gradients["used"].abs().sum() > 0


def test_checkpointed_blocks_give_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    x = torch.randn(3, 4)
    plan = CapturePlan.for_model(model)
    with GradientCollector(model, plan) as plain:
        model(x).square().sum().backward()
    with GradientCollector(model, plan) as recomputed:
        checkpoint(model[1], model[0](x), use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(recomputed.rows, plain.rows, rtol=1e-6, atol=1e-7)


def test_the_model_is_left_as_it_was_found(language):
    model, ids, labels = language
    model.blocks[0].down.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    collect(model, CapturePlan.for_model(model, MATRICES), ids, labels)
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_and_flags_are_put_back_after_an_error(language):
    model, _, _ = language
    with pytest.raises(ZeroDivisionError), GradientCollector(model, CapturePlan.for_model(model, MATRICES)):
        _ = 1 / 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_freezing_training_gradients_are_untouched(language):
    model, ids, labels = language
    losses(model, ids, labels).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plan = CapturePlan.for_model(model, MATRICES)
    with GradientCollector(model, plan, freeze=False) as collector:
        losses(model, ids, labels).sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    down = collector.gradients["blocks.1.down"].sum(0)
    torch.testing.assert_close(down, expected["blocks.1.down.weight"], rtol=1e-5, atol=1e-6)


def test_scaling_the_loss_scales_the_gradient(language):
    model, ids, labels = language
    plan = CapturePlan.for_model(model, MATRICES)
    plain = collect(model, plan, ids, labels).rows
    with GradientCollector(model, plan) as collector:
        (losses(model, ids, labels) * torch.tensor([1.0, 2.0, 4.0, 0.0])).sum().backward()
    torch.testing.assert_close(collector.rows, plain * torch.tensor([[1.0], [2.0], [4.0], [0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(language, dtype):
    model, ids, labels = language
    plan = CapturePlan.for_model(model, MATRICES, sketch=TwoSided(4))
    exact = collect(model, plan, ids, labels).rows
    half = collect(model.to(dtype), plan, ids, labels).rows
    assert relative(half, exact) < (0.03 if dtype == torch.bfloat16 else 0.005)


def test_identity_holds_outer_products():
    layer = nn.Linear(3, 2, bias=False)
    x, weights = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    model = nn.Sequential(layer)
    with GradientCollector(model, CapturePlan.for_model(model, sketch=Identity())) as collector:
        (model(x) * weights).sum().backward()
    torch.testing.assert_close(collector.gradients["0"], torch.einsum("nso,nsi->noi", weights, x))


class TestRefusals:
    def test_gradients_switched_off(self):
        model = nn.Sequential(nn.Linear(2, 2))
        for off in (torch.no_grad, torch.inference_mode):
            with (
                pytest.raises(CaptureError, match="switched off"),
                GradientCollector(model, CapturePlan.for_model(model)),
                off(),
            ):
                model(torch.ones(1, 2))

    def test_input_changed_in_place(self):
        model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
        with GradientCollector(model, CapturePlan.for_model(model)):
            loss = model(x).sum()
            x += 1
            with pytest.raises(CaptureError, match=r"input of 0 was changed in place"):
                loss.backward()

    def test_another_model(self):
        plan = CapturePlan.for_model(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(CaptureError, match="no module '0'"), GradientCollector(Reused(), plan):
            pass
        with (
            pytest.raises(CaptureError, match=r"0 is \[3, 2\], the plan says \[2, 2\]"),
            GradientCollector(nn.Sequential(nn.Linear(2, 3)), plan),
        ):
            pass

    def test_nothing_collected(self):
        model = nn.Sequential(nn.Linear(2, 2))
        with GradientCollector(model, CapturePlan.for_model(model)) as collector:
            model(torch.ones(1, 2))
        with pytest.raises(CaptureError, match="nothing was collected"):
            _ = collector.gradients

    def test_batches_that_disagree(self):
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        with GradientCollector(model, CapturePlan.for_model(model)):
            total = model[0](torch.ones(3, 2)).sum() + model[1](torch.ones(4, 2)).sum()
            with pytest.raises(CaptureError, match="first dimension"):
                total.backward()


def test_conv1d_stand_in_is_recognised():
    assert CapturePlan.for_model(nn.Sequential(Conv1D(3, 2))).modules[0].kind == "hf_conv1d"
