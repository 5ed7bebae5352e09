"""Dense, sparse and global sketches: equal to their matrices on whole gradients, unbiased, as noisy as theory says."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gradcore import CapturePlan, Dense, GlobalSketch, GradCoreError, GradientCollector, Identity, SparseJL
from gradcore._factors import OneHot
from gradcore.sketches import sketch_from_dict

CPU = torch.device("cpu")
KINDS = [Dense(32, seed=1), SparseJL(32, 4, seed=1), SparseJL(32, 1, seed=1)]


def matrix_of(sketch, name, width):
    """P, written out from the sketch's own description."""
    if isinstance(sketch, Dense):
        return sketch.signs(name, width).float() / sketch.floats**0.5
    places, signs = sketch.hashes(name, width)
    block, matrix = sketch.floats // sketch.nonzeros, torch.zeros(sketch.floats, width)
    for number in range(sketch.nonzeros):
        for column in range(width):
            matrix[number * block + int(places[number, column]), column] = int(signs[number, column])
    return matrix / sketch.nonzeros**0.5


@pytest.mark.parametrize("sketch", KINDS, ids=str)
@pytest.mark.parametrize("at_once", [1, 150, 1 << 24])
def test_they_are_one_matrix_times_the_whole_gradient(sketch, at_once, monkeypatch):
    monkeypatch.setattr("gradcore.sketches._whole.FORMED_FLOATS", at_once)
    g, x = torch.randn(5, 6, 7), torch.randn(5, 6, 9)
    bound = sketch.bind("m", 7, 9, CPU)
    found = bound.combine(bound.project_out(g), bound.project_in(x))
    matrix = matrix_of(sketch, "m", 63)
    assert_close(found, (g.mT @ x).flatten(1) @ matrix.T, rtol=1e-5, atol=1e-5)

    ids = torch.randint(-1, 7, (5, 6))
    looked_up = bound.combine(OneHot(ids, 7), x)
    onehot = torch.zeros(5, 6, 8).scatter_(2, torch.where(ids < 0, 7, ids)[..., None], 1.0)[..., :7]
    assert_close(looked_up, (onehot.mT @ x).flatten(1) @ matrix.T, rtol=1e-5, atol=1e-5)

    vectors = torch.randn(5, 21, 3)
    assert_close(
        sketch.bind("v", 21, 3, CPU, True).vector(vectors), vectors.flatten(1) @ matrix_of(sketch, "v", 63).T,
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("sketch", KINDS, ids=str)
def test_a_gradient_that_is_no_larger_is_kept_whole(sketch):
    g, x = torch.randn(2, 3, 4), torch.randn(2, 3, 8)
    bound = sketch.bind("m", 4, 8, CPU)
    assert_close(bound.combine(bound.project_out(g), bound.project_in(x)), (g.mT @ x).flatten(1))


@pytest.mark.parametrize("kind", [Dense, SparseJL])
def test_norms_are_unbiased_and_as_noisy_as_theory_says(kind):
    """Relative variance of ‖P v‖²: 2/floats for dense signs, and nearly so for sparse ones."""
    v = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    ratios = []
    for seed in range(1500):
        bound = kind(64, seed=seed).bind("m", 20, 20, CPU)
        ratios.append(float(bound.product(v).square().sum() / v.square().sum()))
    ratios = torch.tensor(ratios)
    assert abs(float(ratios.mean()) - 1) < 5 * float(ratios.std()) / 1500**0.5
    assert abs(float(ratios.var()) / (2 / 64) - 1) < 0.25  # the variance of 1,500 draws has a standard error of .04


def test_rows_of_a_smaller_dense_sketch_are_the_first_of_a_larger(monkeypatch):
    large = Dense(40).signs("m", 500)
    assert torch.equal(Dense(8).signs("m", 500), large[:8])
    monkeypatch.setattr("gradcore.sketches.dense._SIGNS_AT_ONCE", 1200)  # drawn two rows at a time
    assert torch.equal(Dense(40).signs("m", 500), large)


def test_no_two_modules_or_seeds_share_a_matrix():
    for kind in (Dense, SparseJL):
        drawn = [matrix_of(kind(16, seed=seed), name, 50) for name in ("a", "b") for seed in (0, 1)]
        for place, first in enumerate(drawn):
            assert not any(torch.equal(first, second) for second in drawn[place + 1 :])


def test_too_large_a_dense_sketch_is_refused():
    with pytest.raises(GradCoreError, match=r"11\.4 GiB.*tensor sketch"):
        Dense(4096).bind("lm_head", 1500, 2000, CPU)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.norm, self.last = (
            nn.Embedding(30, 12), nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 3),
        )  # fmt: skip

    def forward(self, ids):
        return self.last(self.norm(torch.tanh(self.first(self.table(ids)))))


def collected(model, ids, sketch):
    plan = CapturePlan.for_model(model, sketch=sketch, include_bias=True)
    with GradientCollector(model, plan) as collector:
        for batch in ids.split(3):
            model(batch).square().sum().backward()
    return plan, collector


def test_a_global_sketch_estimates_the_inner_product_over_all_parameters():
    torch.manual_seed(0)
    model, ids = Net(), torch.randint(30, (8, 5))
    whole = collected(model, ids, Identity())[1].rows
    exact, found = whole @ whole.T, []
    for seed in range(300):
        plan, collector = collected(model, ids, GlobalSketch(64, seed))
        assert plan.columns == {"global": 64}
        assert collector.gradients["global"].shape == (8, 64)
        found.append(collector.rows @ collector.rows.T)
    spread = torch.stack(found)
    error = (spread.mean(0) - exact).abs() / (spread.std(0) / 300**0.5)
    assert float(error.max()) < 5
    assert float(spread.std(0).mean() / exact.diagonal().mean()) < 0.35  # √(6/64) at most for one rank-one module


def test_global_rows_do_not_depend_on_the_batch_and_are_the_sum_of_their_modules():
    torch.manual_seed(0)
    model, ids = Net(), torch.randint(30, (8, 5))
    sketch = GlobalSketch(48, 3)
    plan, collector = collected(model, ids, sketch)
    total = torch.zeros(8, 48)
    for module in plan.modules:
        alone = CapturePlan((module,), sketch)
        with GradientCollector(model, alone) as part:
            model(ids).square().sum().backward()
        total = total + part.rows
    assert_close(total, collector.rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sketch", [Dense(64, 2), SparseJL(64, 8, 2), GlobalSketch(128, 2)], ids=str)
def test_they_come_back_from_a_saved_plan(sketch):
    assert sketch_from_dict(sketch.to_dict()) == sketch


@pytest.mark.parametrize(
    ("kind", "sizes"), [(Dense, [0]), (SparseJL, [30, 4]), (SparseJL, [4, 4]), (GlobalSketch, [1])]
)
def test_sizes_that_make_no_sense_are_refused(kind, sizes):
    with pytest.raises(GradCoreError, match=r"keeps at least|divisible"):
        kind(*sizes)
