"""Tensor and spectral sketches: equal to their definitions on whole gradients, unbiased or best, and never mixed up."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradcore import (
    CapturePlan,
    GradCoreError,
    GradientCollector,
    Spectral,
    SpectralBasis,
    TensorSketch,
    fidelity,
    fit_spectral,
    with_residual,
)
from gradcore._factors import OneHot
from gradcore._fit_spectral import _Factors
from gradcore.sketches.tensor import bound_tensor_sketch

CPU = torch.device("cpu")


def rank_one_sums(out, into, examples=4, positions=6):
    return torch.randn(examples, positions, out), torch.randn(examples, positions, into)


@pytest.mark.parametrize(
    ("out", "into", "floats"),
    [(7, 5, 16), (40, 30, 16), (16, 100, 16), (16, 16, 16), (3, 50, 64), (6, 40, 17), (9, 5, 33)],
)
@pytest.mark.parametrize("products", [True, False])
def test_a_tensor_sketch_is_a_count_sketch_of_the_whole_gradient(out, into, floats, products, monkeypatch):
    monkeypatch.setattr("gradcore.sketches.tensor._product_is_cheaper", lambda *_: products)
    bound = TensorSketch(floats, seed=3).bind("m", out, into, CPU)
    left, right = bound._left, bound._right
    g, x = rank_one_sums(out, into)
    place = (left.places[:, None] + right.places) % floats
    signed = (g.mT @ x) * (left.signs[:, None] * right.signs)
    want = torch.zeros(4, floats).index_add_(1, place.flatten(), signed.flatten(1))
    assert_close(bound.combine(bound.project_out(g), bound.project_in(x)), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("products", [True, False])
def test_blocks_of_positions_change_nothing(products, monkeypatch):
    monkeypatch.setattr("gradcore.sketches.tensor._product_is_cheaper", lambda *_: products)
    bound = TensorSketch(16).bind("m", 20, 12, CPU)
    g, x = rank_one_sums(20, 12, examples=5, positions=11)
    kept = bound.project_out(g), bound.project_in(x)
    want = bound.combine(*kept)
    for floats in (16, 16 * 4, 16 * 25):
        monkeypatch.setattr("gradcore.sketches.tensor.BLOCK_FLOATS", floats)
        assert_close(bound.combine(*kept), want, rtol=1e-5, atol=1e-5)


def test_many_positions_of_narrow_layers_are_multiplied_and_few_of_wide_ones_transformed():
    from gradcore.sketches.tensor import _product_is_cheaper

    assert _product_is_cheaper(512, 64, 172, 256)
    assert _product_is_cheaper(512, 128, 384, 1024)
    assert not _product_is_cheaper(512, 1024, 1024, 1024)
    assert not _product_is_cheaper(4, 64, 64, 256)


def test_inner_products_of_tensor_sketches_are_unbiased():
    draw = torch.Generator().manual_seed(0)
    g, x = torch.randn(2, 3, 24, generator=draw), torch.randn(2, 3, 40, generator=draw)
    exact = (g.mT @ x).flatten(1)
    found = []
    for seed in range(600):
        bound = TensorSketch(32, seed).bind("m", 24, 40, CPU)
        rows = bound.combine(bound.project_out(g), bound.project_in(x))
        found.append(rows @ rows.T)
    spread = torch.stack(found)
    error = spread.mean(0) - exact @ exact.T
    # Five standard errors of a mean of 600.
    assert bool((error.abs() < 5 * spread.std(0) / 600**0.5).all())


def test_lookups_and_vectors_are_sketched_as_what_they_stand_for():
    ids = torch.tensor([[3, 9, -1], [0, 3, 3]])
    dense = torch.zeros(2, 3, 30)
    for n, s in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        dense[n, s, ids[n, s]] = 1
    other = torch.randn(2, 3, 8)
    for floats in (16, 64):
        bound = TensorSketch(floats).bind("table", 30, 8, CPU)
        looked_up = bound.combine(bound.project_out(OneHot(ids, 30)), bound.project_in(other))
        assert_close(looked_up, bound.combine(bound.project_out(dense), bound.project_in(other)), rtol=1e-5, atol=1e-5)
    gradient = torch.randn(2, 30, 2)
    assert_close(TensorSketch(60).bind("norm", 30, 2, CPU, True).vector(gradient), gradient.flatten(1))
    assert TensorSketch(16).bind("norm", 30, 2, CPU, True).vector(gradient).shape == (2, 16)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 12), nn.LayerNorm(12)
        self.inner, self.outer = nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, ids):
        return self.outer(torch.tanh(self.inner(self.norm(self.table(ids)))))


def losses(model, ids):
    return model(ids).square().sum()


def rows_of(model, plan, ids):
    with GradientCollector(model, plan) as collector:
        losses(model, ids).backward()
    return collector.rows


@pytest.fixture
def fitted():
    model, ids = Net(), torch.randint(50, (40, 7))
    plan = CapturePlan.for_model(model)
    return model, plan, ids, fit_spectral(model, plan, lambda: losses(model, ids).backward(), floats=25)


def test_a_spectral_sketch_keeps_the_largest_moments_of_its_basis(fitted):
    model, plan, ids, spectral = fitted
    whole = GradientCollector(model, plan)
    with whole as collector:
        losses(model, ids).backward()
    exact, kept = collector.gradients, spectral.sketch.basis.modules
    rows = rows_of(model, spectral, ids)
    for name in ("inner", "outer"):
        gradient = exact[name].double()
        # The reference: full eigenbases of the sums over every position, from the gradient's own factors.
        basis = kept[name]
        corner = basis.out_basis.double().T @ gradient @ basis.in_basis.double()
        chosen = corner.flatten(1)[:, basis.pairs]
        assert_close(rows[:, spectral.slices[name]], chosen.float(), rtol=1e-4, atol=1e-5)
        moments = corner.square().mean(0).flatten()
        assert_close(basis.moments, moments[basis.pairs].float(), rtol=1e-3, atol=1e-6)
        assert float(basis.moments[-1]) >= 0.999 * float(moments.sort().values[-len(basis.pairs)])
        assert_close(basis.out_basis.T @ basis.out_basis, torch.eye(basis.out_basis.shape[1]), rtol=0, atol=1e-5)
    assert "table" not in kept  # a lookup table is tensor-sketched
    assert spectral.columns == {"table": 25, "norm": 12, "inner": 25, "outer": 25}


def test_a_basis_as_large_as_the_gradient_is_a_rotation(fitted):
    model, plan, ids, _ = fitted
    part = plan.restrict(["norm", "inner", "outer"])
    spectral = fit_spectral(model, part, lambda: losses(model, ids).backward(), floats=12 * 20)
    exact, rows = rows_of(model, part, ids), rows_of(model, spectral, ids)
    assert rows.shape == exact.shape
    assert_close(rows @ rows.T, exact @ exact.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("positions", "out", "into"), [(2, 24, 20), (40, 6, 5)])  # pairs of positions; formed
def test_a_basis_is_of_positions_and_of_examples_half_and_half(positions, out, into, monkeypatch):
    monkeypatch.setattr("gradcore._fit_spectral.FORMED", 70)
    found, batches = _Factors(), [rank_one_sums(out, into, 5, positions), rank_one_sums(out, into, 3, positions)]
    for g, x in batches:
        found.add(g, x)
    sums = [torch.zeros(2, d, d, dtype=torch.double) for d in (out, into)]
    weights = []
    for g, x in ((g.double(), x.double()) for g, x in batches):
        for one, other in zip(g, x):
            gradient = one.T @ other
            sums[0] += torch.stack((one.T @ one, gradient @ gradient.T))
            sums[1] += torch.stack((other.T @ other, gradient.T @ gradient))
        weights = weights or [each[0].trace() / each[1].trace() for each in sums]
    for side, (by_position, by_example), weight in zip(found.sides(), sums, weights):
        assert_close(side.double(), by_position + weight * by_example, rtol=1e-4, atol=1e-4)


def test_a_module_without_any_gradient_has_a_basis_without_nan():
    found = _Factors()
    found.add(torch.zeros(3, 2, 6), torch.randn(3, 2, 5))
    assert all(side.isfinite().all() for side in found.sides())
    g, x = rank_one_sums(6, 5, 3, 2)
    found.add(g, x)  # only now both kinds can be weighed
    out = sum(one.T @ one for one in g)
    gradients = [one.T @ other for one, other in zip(g, x)]
    by_example = sum(each @ each.T for each in gradients)
    assert_close(found.sides()[0], out + by_example * out.trace() / by_example.trace(), rtol=1e-4, atol=1e-5)


def test_a_shared_budget_goes_where_the_moments_are(fitted):
    model, plan, ids, _ = fitted
    part = plan.restrict(["inner", "outer"])
    run = lambda: losses(model, ids).backward()  # noqa: E731
    shared, equal = fit_spectral(model, part, run, total=60), fit_spectral(model, part, run, floats=30)
    assert shared.width == equal.width == 60
    held = [sum(float(b.moments.sum()) for b in plan.sketch.basis.modules.values()) for plan in (shared, equal)]
    assert held[0] >= held[1]
    assert CapturePlan.from_dict(shared.to_dict()) == shared


def test_spectral_keeps_more_than_chance(fitted):
    model, plan, ids, _ = fitted
    fresh = torch.randint(50, (30, 7))
    part = plan.restrict(["inner", "outer"])
    exact = rows_of(model, part, fresh)
    few = fit_spectral(model, part, lambda: losses(model, ids).backward(), floats=16)
    fit = fidelity(rows_of(model, few, fresh), exact)
    blind = fidelity(rows_of(model, CapturePlan(part.modules, TensorSketch(16)), fresh), exact)
    assert fit.spearman > blind.spearman
    assert fit.error < blind.error


def test_plans_carry_the_digest_and_files_the_basis(fitted):
    model, _, ids, spectral = fitted
    saved = CapturePlan.from_dict(spectral.to_dict())
    assert saved == spectral
    assert saved.digest == spectral.digest
    with pytest.raises(GradCoreError, match="needs its basis"):
        rows_of(model, saved, ids)
    basis = SpectralBasis.from_tensors(spectral.sketch.basis.tensors())
    again = CapturePlan(saved.modules, saved.sketch.with_basis(basis))
    assert torch.equal(rows_of(model, again, ids), rows_of(model, spectral, ids))
    tensors = basis.tensors()
    tensors["inner.pairs"] = tensors["inner.pairs"].flip(0)
    with pytest.raises(GradCoreError, match="different bases cannot be compared"):
        saved.sketch.with_basis(SpectralBasis.from_tensors(tensors))
    del tensors["inner.moments"]
    with pytest.raises(GradCoreError, match=r"inner\.moments"):
        SpectralBasis.from_tensors(tensors)


@pytest.mark.parametrize("sketch", [TensorSketch(8), "spectral"])
def test_batches_do_not_change_rows(fitted, sketch):
    model, plan, ids, spectral = fitted
    plan = spectral if sketch == "spectral" else CapturePlan(plan.modules, sketch)
    together = rows_of(model, plan, ids[:9])
    apart = torch.cat([rows_of(model, plan, ids[:4]), rows_of(model, plan, ids[4:9])])
    assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_fidelity_is_what_it_says():
    exact = torch.randn(12, 40)
    same = fidelity(2 * exact, exact)
    assert same.spearman == pytest.approx(1)
    assert same.norm == pytest.approx(3)
    assert fidelity(torch.randn(12, 40), exact).spearman < 0.6
    with pytest.raises(GradCoreError, match="at least 3"):
        fidelity(exact[:2], exact[:2])
    with pytest.raises(GradCoreError, match="not of the same"):
        fidelity(exact[:5], exact)
    with pytest.raises(GradCoreError, match="at least 2"):
        Spectral(1)


def dense_tail(plan, whole):
    """Per module: the gradient less its projection on the kept coordinates, written out."""
    found = {}
    for module in plan.modules:
        basis, gradient = plan.sketch.basis.modules[module.name], whole[module.name]
        columns = basis.in_basis.shape[1]
        left, right = basis.out_basis[:, basis.pairs // columns], basis.in_basis[:, basis.pairs % columns]
        atoms = torch.einsum("ok,ik->koi", left, right)
        matrix = gradient.flatten(2) if not module.elementwise else gradient.flatten(1)[..., None]
        kept = torch.einsum("noi,koi->nk", matrix, atoms)
        found[module.name] = matrix - torch.einsum("nk,koi->noi", kept, atoms)
    return found


def test_a_residual_is_the_tensor_sketch_of_what_the_basis_leaves_out():
    torch.manual_seed(0)
    model, x = Net(), torch.randint(50, (40, 6))
    plan = CapturePlan.for_model(model, exclude="table", include_bias=True)
    run = lambda: model(x).square().sum().backward()  # noqa: E731
    fitted = fit_spectral(model, plan, run, floats=32, total=32 * len(plan.modules))
    split = with_residual(fitted, 0.5)
    assert split.width <= fitted.width
    with GradientCollector(model, plan) as exact:
        run()
    with GradientCollector(model, split) as found:
        run()
    tails = dense_tail(split, exact.gradients)
    for module in split.modules:
        lead = len(split.sketch.basis.modules[module.name].pairs)
        rows = found.gradients[module.name]
        rest = rows.shape[1] - lead
        if not rest:
            continue
        tail = tails[module.name]
        bound = bound_tensor_sketch(
            (module.name, "residual"), module.out_features, module.in_features, rest, 0, CPU, module.elementwise
        )
        if module.elementwise:
            want = bound.vector(tail[..., 0].unflatten(1, (module.out_features, -1)))
        else:  # column by column, each a rank-one gradient
            eye = torch.eye(module.in_features).expand(len(tail), -1, -1)
            want = bound.combine(bound.project_out(tail.mT), bound.project_in(eye))
        assert_close(rows[:, lead:], want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_with_a_residual_inner_products_are_unbiased():
    torch.manual_seed(0)
    model, x = Net(), torch.randint(50, (10, 6))
    plan = CapturePlan.for_model(model)
    run = lambda: model(x).square().sum().backward()  # noqa: E731
    with GradientCollector(model, plan) as exact:
        run()
    want, found = exact.rows @ exact.rows.T, []
    fitted = with_residual(fit_spectral(model, plan, run, floats=24, total=24 * len(plan.modules)))
    for seed in range(200):
        sketch = replace(fitted.sketch, seed=seed)
        with GradientCollector(model, replace(fitted, sketch=sketch)) as collector:
            run()
        found.append(collector.rows @ collector.rows.T)
    spread = torch.stack(found)
    assert float(((spread.mean(0) - want).abs() / (spread.std(0) / 200**0.5)).max()) < 5


def test_a_residual_needs_a_fitted_basis_and_comes_back_from_a_saved_plan():
    torch.manual_seed(0)
    model, x = Net(), torch.randint(50, (10, 6))
    plan = CapturePlan.for_model(model)
    with pytest.raises(GradCoreError, match="fitted with a total"):
        with_residual(plan)
    with pytest.raises(GradCoreError, match="residual=0 without them"):
        Spectral(residual=8)
    fitted = with_residual(
        fit_spectral(model, plan, lambda: model(x).square().sum().backward(), floats=24, total=24 * len(plan.modules))
    )
    again = CapturePlan.from_dict(fitted.to_dict())
    assert again == fitted
    assert again.columns == fitted.columns
    assert again.sketch.with_basis(fitted.sketch.basis).residual == fitted.sketch.residual > 0
