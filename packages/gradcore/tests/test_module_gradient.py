"""Factor pairs: every product equals that of the gradients written out, by either route and in every dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gradcore_models import Reused, TinyLM
from gradcore_reference import relative
from torch import nn

from gradcore import (
    CaptureError,
    CapturePlan,
    GradCoreError,
    GradientCollector,
    Identity,
    ModuleGradient,
    SparseJL,
    TensorSketch,
    TwoSided,
)
from gradcore import _module_gradient as module_gradient
from gradcore._factors import OneHot

SHAPES = [(3, 2, 9, 7), (3, 40, 4, 5), (1, 1, 6, 6), (5, 3, 1, 8)]  # n, s, out, in: ghost is cheaper, or formed


def pair(n: int, s: int, out: int, into: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> ModuleGradient:
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, s, d, generator=draw, dtype=torch.float64).to(dtype) for d in (out, into))
    return ModuleGradient("layer", left, right)


def looked_up(n: int, s: int, out: int, into: int, seed: int = 0) -> ModuleGradient:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, out, (n, s), generator=draw)
    return ModuleGradient("table", OneHot(ids, out), torch.randn(n, s, into, generator=draw, dtype=torch.float64))


def vector(n: int, s: int, out: int, into: int, seed: int = 0) -> ModuleGradient:
    draw = torch.Generator().manual_seed(seed)
    return ModuleGradient("norm", vectors=tuple(torch.randn(n, s, out, generator=draw).double() for _ in range(2)))


@pytest.mark.parametrize("make", [pair, looked_up, vector])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_of_the_gradients_written_out(make, shape, monkeypatch):
    mine, other = make(*shape), make(shape[0] + 2, shape[1] + 1, *shape[2:], seed=1)
    dense, theirs = mine.dense(), other.dense()
    for floats in (1, 1 << 24):  # one example a block, and all of them
        monkeypatch.setattr(module_gradient, "FORMED_FLOATS", floats)
        torch.testing.assert_close(mine.sq_norm(), dense.square().sum((1, 2)))
        torch.testing.assert_close(mine.dot(other), torch.einsum("noi,moi->nm", dense, theirs))
        torch.testing.assert_close(mine.dot(theirs), torch.einsum("noi,moi->nm", dense, theirs))
        for route in ("", "contracted", "formed"):
            for some in (theirs, theirs[:1], theirs[:0]):
                expected = torch.einsum("noi,moi->nm", dense, some)
                torch.testing.assert_close(mine.dot(some, route=route), expected)
                dots, squares = mine.dot_and_sq_norm(some, route=route)
                torch.testing.assert_close(dots, expected)
                torch.testing.assert_close(squares, dense.square().sum((1, 2)))
    torch.testing.assert_close(mine.sum_over_examples(), dense.sum(0))
    weights = torch.arange(len(mine)).double() - 1
    torch.testing.assert_close(mine.scaled(weights).dense(), dense * weights[:, None, None])
    torch.testing.assert_close(mine[1:3].dense(), dense[1:3])
    positions = mine.per_position()
    assert len(positions) == shape[0] * shape[1]
    torch.testing.assert_close(positions.dense().unflatten(0, (shape[0], shape[1])).sum(1), dense)


def test_a_looked_up_table_meets_factors_of_any_kind():
    """Queries of low rank are dense factors."""
    table, query = looked_up(3, 2, 50, 4), pair(2, 2, 50, 4)
    expected = torch.einsum("noi,moi->nm", table.dense(), query.dense())
    torch.testing.assert_close(table.dot(query), expected)
    torch.testing.assert_close(query.dot(table), expected.T)


@pytest.mark.parametrize("make", [pair, looked_up, vector])
def test_parts_are_joined_by_call_and_by_block(make):
    calls = [make(4, 3, 5, 6, seed=seed) for seed in (0, 1)]
    whole = calls[0].dense() + calls[1].dense()
    torch.testing.assert_close(ModuleGradient.joined(calls).dense(), whole)
    blocks = [replace(each[some], first=some.start) for some in (slice(2, 4), slice(0, 2)) for each in calls]
    joined = ModuleGradient.joined(blocks)
    torch.testing.assert_close(joined.dense(), whole)
    matrices = make(3, 2, 5, 6, seed=2).dense()
    for count in (1, 3):
        dots, squares = joined.dot_and_sq_norm(matrices[:count])
        torch.testing.assert_close(dots, whole.flatten(1) @ matrices[:count].flatten(1).T)
        torch.testing.assert_close(squares, whole.square().sum((1, 2)))


@pytest.mark.parametrize("sketch", [TwoSided(3), TensorSketch(12), SparseJL(16), Identity()], ids=lambda s: s.kind)
def test_a_sketch_of_factors_is_what_a_collector_stores(sketch):
    torch.manual_seed(0)
    model, ids = TinyLM(), torch.randint(0, 23, (4, 6))
    plan = CapturePlan.for_model(model, sketch=sketch, include_bias=True)
    with GradientCollector(model, plan) as collector:
        run(model, ids)
    stored, found = collector.gradients, {}
    with GradientCollector(model, replace(plan, sketch=Identity()), factors=lambda g: found.update({g.name: g})):
        run(model, ids)
    for name, expected in stored.items():
        assert relative(found[name].sketch(sketch), expected.flatten(1)) < 1e-5, name
        shape = found[name].shape
        bound = sketch.bind(name, *shape, ids.device, found[name].into is None)
        assert torch.equal(found[name].sketch(bound), found[name].sketch(sketch))


def test_both_routes_are_taken_where_they_are_cheaper(monkeypatch):
    """Few positions and a large matrix: ghost; many positions and a small one: formed."""
    taken = []
    ghost = module_gradient._ghost
    monkeypatch.setattr(module_gradient, "_ghost", lambda *a, **k: (taken.append(1), ghost(*a, **k))[1])
    pair(2, 2, 64, 64).sq_norm()
    pair(2, 2, 64, 64).dot(pair(2, 2, 64, 64, seed=1))
    assert len(taken) == 2
    pair(2, 64, 4, 4).sq_norm()
    pair(2, 64, 4, 4).dot(pair(2, 64, 4, 4, seed=1))
    assert len(taken) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_multiplied_in_float32(dtype):
    """The squared norm of 1e3·ones would overflow float16, and 2000 positions lose terms in bfloat16."""
    gradient = ModuleGradient(
        "layer", torch.full((1, 2000, 4), 30.0, dtype=dtype), torch.full((1, 2000, 4), 2.0, dtype=dtype)
    )
    expected = (2000 * 60.0) ** 2 * 16
    for found in (gradient.sq_norm(), gradient.dot(gradient)[:, 0], gradient.dense().square().sum((1, 2))):
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_route_that_there_is_not_is_refused():
    with pytest.raises(GradCoreError, match="contracted and formed, not 'ghost'"):
        pair(2, 3, 4, 5).dot(torch.ones(1, 4, 5), route="ghost")


def test_gradients_of_other_shapes_are_refused():
    with pytest.raises(GradCoreError, match=r"\[4, 5\] have no inner product with \[4, 6\]"):
        pair(2, 3, 4, 5).dot(pair(2, 3, 4, 6))
    with pytest.raises(GradCoreError, match="either a pair"):
        ModuleGradient("layer", torch.ones(1, 1, 1))


def run(model: TinyLM, ids: torch.Tensor) -> None:
    model.head(model.hidden(ids)).square().sum().backward()


@pytest.mark.parametrize("sketch", [None, TwoSided(3)])
def test_a_collector_hands_over_factors_of_what_it_would_store(sketch):
    torch.manual_seed(0)
    model, ids = TinyLM(), torch.randint(0, 23, (4, 6))
    plan = CapturePlan.for_model(model, sketch=sketch, include_bias=True)
    with GradientCollector(model, plan) as collector:
        run(model, ids)
    stored, found = collector.gradients, {}
    with GradientCollector(model, plan, factors=lambda each: found.update({each.name: each.dense()})):
        run(model, ids)
    assert found.keys() == stored.keys()
    for name, expected in stored.items():
        assert relative(found[name].flatten(1), expected.flatten(1)) < 1e-5, name


@pytest.mark.parametrize("sketch", [None, TwoSided(3), TensorSketch(16)])
def test_rows_of_positions_sum_to_the_row_of_their_example(sketch):
    torch.manual_seed(0)
    model, ids = TinyLM(), torch.randint(0, 23, (4, 6))
    plan = CapturePlan.for_model(model, sketch=sketch, include_bias=True)
    rows = []
    for per_position in (False, True):
        with GradientCollector(model, plan, per_position=per_position) as collector:
            run(model, ids)
        rows.append(collector.rows.clone())
    assert rows[1].shape == (24, plan.width)
    assert relative(rows[1].unflatten(0, (4, 6)).sum(1), rows[0]) < 1e-5


def test_a_position_row_is_the_gradient_of_that_use_of_the_weight():
    """Autograd's answer: the weight is a different leaf at every position."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2, bias=False)), torch.randn(2, 4, 3)
    uses = model[0].weight.detach().expand(2, 4, 2, 3).clone().requires_grad_()
    torch.einsum("nsoi,nsi->nso", uses, x).tanh().cumsum(1).square().sum().backward()
    with GradientCollector(model, CapturePlan.for_model(model), per_position=True) as collector:
        model(x).tanh().cumsum(1).square().sum().backward()
    torch.testing.assert_close(collector.gradients["0"], uses.grad.flatten(0, 1))


def test_a_module_called_again_hands_over_factors_of_each_call():
    model, calls = Reused(), []
    plan = CapturePlan.for_model(model)
    with GradientCollector(model, plan, factors=lambda each: calls.append(each.dense())):
        model(torch.ones(2, 5)).sum().backward()
    with GradientCollector(model, plan) as collector:
        model(torch.ones(2, 5)).sum().backward()
    assert len(calls) == 3
    torch.testing.assert_close(sum(calls), collector.gradients["layer"])


def test_only_bilinear_sketches_have_factors():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(CaptureError, match="tensor sketch has no factors"):
        GradientCollector(model, CapturePlan.for_model(model, sketch=TensorSketch(4)), factors=print)
    with pytest.raises(CaptureError, match="not both"):
        GradientCollector(model, CapturePlan.for_model(model), print, factors=print)
