"""Two-sided sketches keep inner products on average, with the variance that theory gives."""

from __future__ import annotations

import pytest
import torch

from gradcore import GradCoreError, TwoSided
from gradcore.sketches import sketch_from_dict

SEEDS = 2000


def sketched(matrices, sketch):
    left = sketch.matrix("m", "left", matrices.shape[1])
    right = sketch.matrix("m", "right", matrices.shape[2])
    return (left @ matrices @ right.T).flatten(1)


@pytest.mark.parametrize("entries", ["rademacher", "normal"])
@pytest.mark.parametrize("shape", [(12, 12), (5, 30), (40, 3)])
def test_inner_products_are_unbiased_over_seeds(entries, shape):
    pair = torch.randn(2, *shape) + 0.5  # a common part, so that the true product is far from 0
    exact = float((pair[0] * pair[1]).sum())
    estimates = torch.tensor(
        [float(rows[0] @ rows[1]) for seed in range(SEEDS) for rows in [sketched(pair, TwoSided(4, entries, seed))]]
    )
    assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / SEEDS**0.5


@pytest.mark.parametrize("side", [4, 8])
def test_variance_of_a_rank_one_norm_is_the_theory(side):
    """Normal entries: relative variance of ‖L G Rᵀ‖² at rank 1 is (1 + 2/side)² − 1."""
    matrix = torch.outer(torch.randn(20), torch.randn(25))[None]
    exact = float(matrix.square().sum())
    ratios = torch.tensor(
        [float(sketched(matrix, TwoSided(side, "normal", seed)).square().sum()) / exact for seed in range(4 * SEEDS)]
    )
    theory = (1 + 2 / side) ** 2 - 1
    assert abs(float(ratios.var()) / theory - 1) < 0.15


def test_no_two_modules_sides_or_seeds_share_a_matrix():
    matrices = [
        TwoSided(8, "rademacher", seed).matrix(name, side, 64)
        for name in ("a", "b")
        for side in ("left", "right")
        for seed in (0, 1)
    ]
    for place, first in enumerate(matrices):
        for second in matrices[place + 1 :]:
            assert not torch.equal(first, second)


def test_scale_does_not_depend_on_the_layers_shape():
    for shape in ((6, 6), (6, 600)):
        matrix = torch.randn(1, *shape)
        ratios = [
            float(sketched(matrix, TwoSided(16, "rademacher", seed)).square().sum() / matrix.square().sum())
            for seed in range(200)
        ]
        assert abs(sum(ratios) / len(ratios) - 1) < 0.05


def test_saved_and_read_back():
    sketch = TwoSided(8, "normal", 5)
    assert sketch_from_dict(sketch.to_dict()) == sketch
    with pytest.raises(GradCoreError, match="unknown sketch kind 'fft'"):
        sketch_from_dict({"kind": "fft"})


@pytest.mark.parametrize(("options", "message"), [({"side": 0}, "at least 1"), ({"entries": "uniform"}, "rademacher")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(GradCoreError, match=message):
        TwoSided(**options)
