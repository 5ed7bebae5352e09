"""Floats shared by modules: in proportion where they can be, never more than asked for, and worth it."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradcore import (
    CapturePlan,
    Dense,
    GradCoreError,
    GradientCollector,
    Identity,
    ModuleGradient,
    SparseJL,
    TensorSketch,
    TwoSided,
    energies,
    fidelity,
    share_floats,
)
from gradcore.sketches import sketch_from_dict

BUDGETED = [TensorSketch(64), Dense(64), SparseJL(64)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = [(40, 64), (64, 64), (64, 48), (48, 4)]
    return nn.Sequential(*(layer for i, o in sizes for layer in (nn.Linear(i, o, bias=False), nn.Tanh())))


def rows_of(model, plan, x):
    with GradientCollector(model, plan) as collector:
        model(x).square().sum().backward()
        return collector.rows


def factors_of(model, plan, x):
    from dataclasses import replace

    found = []
    with GradientCollector(model, replace(plan, sketch=Identity()), factors=found.append):
        model(x).square().sum().backward()
    return found


@pytest.mark.parametrize("sketch", BUDGETED, ids=lambda s: s.kind)
def test_a_plan_with_budgets_captures_is_saved_and_read_again(sketch, model):
    plan = share_floats(CapturePlan.for_model(model, sketch=sketch), by={"0": 6, "2": 3, "4": 1, "6": 1})
    assert plan.columns == {"0": 144, "2": 64, "4": 32, "6": 16}  # 4 · 64 shared, in steps of 16
    again = CapturePlan.from_dict(plan.to_dict())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.digest == plan.digest
    x = torch.randn(5, 40)
    assert_close(rows_of(model, plan, x), rows_of(model, again, x))
    assert rows_of(model, plan, x).shape == (5, 256)


@pytest.mark.parametrize("sketch", BUDGETED, ids=lambda s: s.kind)
def test_a_module_is_sketched_as_by_a_sketch_of_so_many_floats(sketch, model):
    from dataclasses import replace

    x = torch.randn(3, 40)
    plan = share_floats(CapturePlan.for_model(model, sketch=sketch), by={"0": 6, "2": 3, "4": 1, "6": 1})
    rows = rows_of(model, plan, x)
    for name, floats in plan.columns.items():
        alone = CapturePlan.for_model(model, name, sketch=replace(sketch, floats=floats))
        assert_close(rows[:, plan.slices[name]], rows_of(model, alone, x))


def test_plans_without_budgets_are_saved_as_they_were():
    for sketch in BUDGETED:
        assert "budgets" not in sketch.to_dict()
        assert sketch_from_dict(sketch.to_dict()) == sketch


@pytest.mark.parametrize(
    ("total", "weights"),
    [(256, [1, 1, 1, 1]), (1000, [100, 1, 1, 1]), (64, [5, 1, 1, 1]), (4000, [0, 1, 0, 9]), (10, [1, 2, 3, 4])],
)
def test_shares_are_proportional_between_their_bounds(total, weights, model):
    by = dict(zip(("0", "2", "4", "6"), map(float, weights)))
    plan = share_floats(CapturePlan.for_model(model, sketch=TensorSketch(64)), total, by)
    whole = {"0": 2560, "2": 4096, "4": 3072, "6": 192}
    assert sum(plan.columns.values()) <= max(total, 16 * 4)
    assert sum(plan.columns.values()) > min(total, sum(whole.values())) - 16 * 4  # rounding loses less than a step each
    rates = []
    for name, count in plan.columns.items():
        assert 16 <= count <= whole[name]
        assert count % 16 == 0
        if 16 < count < whole[name]:
            rates.append((count / by[name], 16 / by[name]))
    for rate, step in rates:
        for other, width in rates:
            assert abs(rate - other) <= max(step, width)


def test_without_weights_shapes_are(model):
    plan = share_floats(CapturePlan.for_model(model, sketch=TensorSketch(64)))
    assert plan.columns == {"0": 64, "2": 96, "4": 80, "6": 16}


def test_energies_are_shares_of_squared_norms(model):
    plan = CapturePlan.for_model(model)
    x = torch.randn(6, 40)
    rows = rows_of(model, plan, x).double()
    found = energies(factors_of(model, plan, x))
    for name, part in plan.slices.items():
        want = (rows[:, part].square().sum(1) / rows.square().sum(1)).mean()
        assert found[name] == pytest.approx(float(want), rel=1e-5)
    assert math.isclose(sum(found.values()), 1, rel_tol=1e-9)


def test_examples_without_a_gradient_have_no_say(model):
    plan = CapturePlan.for_model(model)
    x = torch.randn(6, 40)
    padded = [
        ModuleGradient(each.name, *(torch.cat((part, torch.zeros_like(part))) for part in (each.out, each.into)))
        for each in factors_of(model, plan, x)
    ]
    alone = energies(factors_of(model, plan, x))
    assert energies(padded) == pytest.approx(alone)
    with pytest.raises(GradCoreError, match="no example has a gradient"):
        energies([each[6:] for each in padded])
    with pytest.raises(GradCoreError, match="no gradients"):
        energies([])


def test_sharing_by_energy_keeps_more_of_uneven_gradients(model):
    """One layer has nearly all of the gradient; a sketch that knows errs less in as many floats."""
    with torch.no_grad():
        model[0].weight *= 0.02  # later layers see small inputs, so that their gradients are small
        model[2].weight *= 5
    plan = CapturePlan.for_model(model, sketch=TensorSketch(32))
    x = torch.randn(60, 40)
    exact = rows_of(model, CapturePlan.for_model(model), x)
    by = energies(factors_of(model, plan, torch.randn(60, 40)))
    assert max(by.values()) > 0.6
    errors = {"equal": [], "energy": []}
    for seed in range(8):
        equal = CapturePlan.for_model(model, sketch=TensorSketch(32, seed=seed))
        errors["equal"].append(fidelity(rows_of(model, equal, x), exact).error)
        errors["energy"].append(fidelity(rows_of(model, share_floats(equal, by=by), x), exact).error)
    assert sum(errors["energy"]) < 0.8 * sum(errors["equal"])


def test_what_cannot_be_shared_is_refused(model):
    plan = CapturePlan.for_model(model, sketch=TwoSided(8))
    with pytest.raises(GradCoreError, match="two_sided sketch does not share floats"):
        share_floats(plan)
    plan = CapturePlan.for_model(model, sketch=TensorSketch(64))
    with pytest.raises(GradCoreError, match="no weight for 6"):
        share_floats(plan, by={"0": 1, "2": 1, "4": 1})
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(GradCoreError, match="weights must be finite"):
            share_floats(plan, by={"0": bad, "2": 1, "4": 1, "6": 1})
    with pytest.raises(GradCoreError, match="not all zero"):
        share_floats(plan, by={"0": 0, "2": 0, "4": 0, "6": 0})
    with pytest.raises(GradCoreError, match="at least 2 floats of fc"):
        TensorSketch(64, budgets=(("fc", 1),))
