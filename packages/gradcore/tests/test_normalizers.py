"""Normalisers: the scaled gradients are those that autograd's, multiplied by hand, would be, under every sketch."""

from __future__ import annotations

import pytest
import torch
from gradcore_models import TinyLM
from gradcore_reference import planned_one_by_one, relative
from torch import nn

from gradcore import (
    AttentionConfig,
    CapturePlan,
    GradCoreError,
    GradientCollector,
    Identity,
    Normalizer,
    PlanMismatch,
    SparseJL,
    TensorSketch,
    TwoSided,
    fit_spectral,
    normalizer_kinds,
    optimizer_moments,
)
from gradcore import _module_gradient as module_gradient


def moments_of(plan: CapturePlan, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {m.path: torch.rand(m.out_features, m.in_features, generator=draw) + 0.1 for m in plan.modules}


def by_hand(kind: str, v: torch.Tensor) -> torch.Tensor:
    """The scale of every entry, written out from the formulas."""
    if kind == "adam":
        return 1 / (v.sqrt() + 1e-8)
    r, c = v.mean(1, keepdim=True), v.mean(0, keepdim=True)
    if kind == "adafactor":
        return (r * c / v.mean()) ** -0.5
    return v.sum(1, keepdim=True) ** -0.25 * v.sum(0, keepdim=True) ** -0.25


@pytest.fixture(scope="module")
def model() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM()


IDS = torch.randint(0, 23, (3, 6), generator=torch.Generator().manual_seed(1))


def rows(model: TinyLM, plan: CapturePlan, **options) -> torch.Tensor:
    with GradientCollector(model, plan, **options) as collector:
        model.head(model.hidden(IDS)).square().sum().backward()
    return collector.rows.clone()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", normalizer_kinds())
def test_whole_gradients_equal_autograd_times_the_scale(model, kind, bias, monkeypatch):
    plan = CapturePlan.for_model(model, include_bias=bias)
    moments = moments_of(plan)
    normal = CapturePlan(plan.modules, normalizer=Normalizer.of_moments(kind, moments))
    truth = planned_one_by_one(model, lambda n: model.head(model.hidden(IDS[n : n + 1])).square().sum(), 3, plan)
    for floats in (1, 1 << 24):
        monkeypatch.setattr(module_gradient, "FORMED_FLOATS", floats)
        with GradientCollector(model, normal) as collector:
            model.head(model.hidden(IDS)).square().sum().backward()
        for name, found in collector.gradients.items():
            assert relative(found, truth[name] * by_hand(kind, moments[name])) < 1e-4, name


@pytest.mark.parametrize("kind", normalizer_kinds())
@pytest.mark.parametrize("sketch", [TwoSided(4), TensorSketch(32), SparseJL(16)])
def test_a_sketch_is_that_of_the_scaled_gradient(model, kind, sketch):
    """By linearity: bind the sketch and give it the whole scaled gradient."""
    plan = CapturePlan.for_model(model, ["blocks.*", "embed"], include_bias=True)
    normalizer = Normalizer.of_moments(kind, moments_of(plan))
    with GradientCollector(model, CapturePlan(plan.modules, normalizer=normalizer)) as collector:
        model.head(model.hidden(IDS)).square().sum().backward()
    sketched = CapturePlan(plan.modules, sketch=sketch, normalizer=normalizer)
    found = rows(model, sketched)
    for each in plan.modules:
        whole = collector.gradients[each.name]
        bound = sketch.bind(each.name, each.out_features, each.in_features, torch.device("cpu"), each.elementwise)
        expected = (bound.vector if each.elementwise else bound.matrix)(whole).flatten(1)
        assert relative(found[:, sketched.slices[each.name]], expected) < 1e-4, each.name


@pytest.mark.parametrize("kind", normalizer_kinds())
def test_positions_sum_to_their_example(model, kind):
    plan = CapturePlan.for_model(model, include_bias=True)
    plan = CapturePlan(plan.modules, TwoSided(3), normalizer=Normalizer.of_moments(kind, moments_of(plan)))
    assert relative(rows(model, plan, per_position=True).unflatten(0, (3, 6)).sum(1), rows(model, plan)) < 1e-4


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_heads_get_their_slice_of_the_scales(model, kind, side):
    """Bergson skipped normalisers on split heads (PR 354)."""
    whole = CapturePlan.for_model(model, "blocks.0.down")
    heads = CapturePlan.for_model(
        model, "blocks.0.down", attention={"blocks.0.down": AttentionConfig(2, 4 if side == "out" else 8, side=side)}
    )
    normalizer = Normalizer.of_moments(kind, moments_of(whole))
    expected = rows(model, CapturePlan(whole.modules, normalizer=normalizer)).unflatten(1, (8, 16))
    found = rows(model, CapturePlan(heads.modules, normalizer=normalizer))
    parts = expected.split(4, dim=1) if side == "out" else expected.split(8, dim=2)
    torch.testing.assert_close(found, torch.cat([part.flatten(1) for part in parts], dim=1))


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.Adafactor])
def test_a_live_optimiser_its_state_and_its_file_say_the_same(model, factory, tmp_path):
    optimizer = factory(model.parameters(), lr=0.0)
    model.head(model.hidden(IDS)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live = optimizer_moments(model, optimizer)
    assert live["blocks.0.up"].shape == (16, 9)  # Conv1D stores [in, out]
    assert live["blocks.0.norm"].shape == (8, 2)
    for source in (optimizer.state_dict(), tmp_path, tmp_path / "optimizer.pt"):
        found = optimizer_moments(model, source)
        assert found.keys() == live.keys()
        assert all(torch.equal(found[name], live[name]) for name in live)


def test_adam_moments_are_those_of_the_gradient_in_its_orientation(model):
    """One step: v = (1 − β₂) g², and g² once the bias is corrected (Bergson transposed square Conv1Ds)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model.head(model.hidden(IDS)).square().sum().backward()
    optimizer.step()
    weight, bias = model.blocks[0].up.weight.grad, model.blocks[0].up.bias.grad
    expected = torch.cat((weight.T, bias[:, None]), 1).square()
    raw = optimizer_moments(model, optimizer)["blocks.0.up"]
    corrected = optimizer_moments(model, optimizer, bias_corrected=True)["blocks.0.up"]
    model.zero_grad()
    torch.testing.assert_close(raw, expected * 1e-3, rtol=1e-4, atol=0)
    torch.testing.assert_close(corrected, expected, rtol=1e-4, atol=0)


def test_the_trainers_two_groups_are_told_apart_by_weight_decay(model):
    """The state has numbers only; decayed parameters come first, and equal shapes must not be swapped."""
    named = dict(model.named_parameters())
    free = [name for name in named if "bias" in name or "norm" in name]
    groups = [[named[n] for n in named if n not in free], [named[n] for n in free]]
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=0.0)
    model.head(model.hidden(IDS)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    live, saved = optimizer_moments(model, optimizer), optimizer_moments(model, optimizer.state_dict())
    assert all(torch.equal(saved[name], live[name]) for name in live)


def test_states_that_are_not_the_models_are_refused(model, tmp_path):
    other = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    with pytest.raises(GradCoreError, match="has it made a step"):
        optimizer_moments(other, optimizer)
    optimizer.step()
    with pytest.raises(GradCoreError, match="has 2 parameters, the model trains"):
        optimizer_moments(model, optimizer.state_dict())
    with pytest.raises(GradCoreError, match=r"\[3, 3\] where the model has 0.weight \[4, 3\]"):
        optimizer_moments(nn.Sequential(nn.Linear(3, 4)), optimizer.state_dict())
    with pytest.raises(GradCoreError, match=r"optimizer\.pt is not there"):
        optimizer_moments(model, tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"nonsense")
    with pytest.raises(GradCoreError, match="cannot be read"):
        optimizer_moments(model, tmp_path)
    momentum = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    momentum.step()
    with pytest.raises(GradCoreError, match="keeps no second moments"):
        optimizer_moments(other, momentum)
    eight = {"state": {0: {"state2": torch.zeros(9)}, 1: {}}, "param_groups": [{"params": [0, 1]}]}
    with pytest.raises(GradCoreError, match="8 bits"):
        optimizer_moments(other, eight)


def test_a_plan_knows_its_normaliser_and_saves_it_by_digest(model):
    plan = CapturePlan.for_model(model)
    assert "normalizer" not in plan.to_dict()  # stores made before there were any keep their digest
    one, two = (Normalizer.of_moments("adam", moments_of(plan, seed)) for seed in (0, 1))
    with_one = CapturePlan(plan.modules, normalizer=one)
    assert CapturePlan.from_dict(with_one.to_dict()) == with_one
    for other in (plan, CapturePlan(plan.modules, normalizer=two)):
        with pytest.raises(PlanMismatch, match="normalizer differs"):
            with_one.require_equal(other)
    assert Normalizer.from_tensors("adam", one.tensors()) == one
    with pytest.raises(GradCoreError, match="saved without its scales"):
        rows(model, CapturePlan.from_dict(with_one.to_dict()))


def test_what_cannot_be_scaled_is_refused(model):
    plan = CapturePlan.for_model(model)
    with pytest.raises(GradCoreError, match="adafactor, adam, shampoo"):
        Normalizer("lion")
    with pytest.raises(GradCoreError, match="negative or not finite"):
        Normalizer.of_moments("adam", {"a": -torch.ones(2, 2)})
    wrong = Normalizer.of_moments("adam", {m.path: torch.ones(2, 2) for m in plan.modules})
    with pytest.raises(GradCoreError, match=r"scales of \[2, 2\]"):
        rows(model, CapturePlan(plan.modules, normalizer=wrong))
    missing = Normalizer.of_moments("adam", {"embed": torch.ones(23, 8)})
    with pytest.raises(GradCoreError, match=r"no scales for blocks\.0\.norm"):
        rows(model, CapturePlan(plan.modules, normalizer=missing))


@pytest.mark.parametrize("sketch", [Identity(), TwoSided(3)])
@pytest.mark.parametrize("kind", normalizer_kinds())
def test_factors_come_scaled(model, kind, sketch, monkeypatch):
    """Entry by entry they come formed, in blocks of examples that say where they begin."""
    plan = CapturePlan.for_model(model, include_bias=True)
    plan = CapturePlan(plan.modules, sketch, normalizer=Normalizer.of_moments(kind, moments_of(plan)))
    monkeypatch.setattr(module_gradient, "FORMED_FLOATS", 2 * 8 * 17)
    stored, found = rows(model, plan), torch.zeros(3, plan.width)

    def add(gradient):
        examples = slice(gradient.first, gradient.first + len(gradient))
        found[examples, plan.slices[gradient.name]] += gradient.dense().flatten(1)

    with GradientCollector(model, plan, factors=add):
        model.head(model.hidden(IDS)).square().sum().backward()
    assert relative(found, stored) < 1e-4


def test_a_spectral_basis_is_fitted_to_scaled_gradients(model):
    """With as many floats as entries the basis keeps everything: inner products are those of the scaled gradients."""
    plan = CapturePlan.for_model(model, "blocks.*", include_bias=True)

    def run():
        model.head(model.hidden(IDS)).square().sum().backward()

    for kind in ("adam", "adafactor"):
        whole = CapturePlan(plan.modules, normalizer=Normalizer.of_moments(kind, moments_of(plan)))
        fitted = fit_spectral(model, whole, run, floats=8 * 17)
        exact, kept = rows(model, whole), rows(model, fitted)
        assert relative(kept @ kept.T, exact @ exact.T) < 1e-3
