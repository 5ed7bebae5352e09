"""The best of a sweep, from scores that are only about right, against sorting the exact ones."""

from __future__ import annotations

import numpy as np
import pytest

from gradstore._best import Best


@pytest.mark.parametrize("seed", range(30))
def test_best_equals_a_stable_sort_of_exact_scores(seed):
    rng = np.random.default_rng(seed)
    queries, rows, k = int(rng.integers(0, 4)), int(rng.integers(1, 2000)), int(rng.integers(0, 40))
    exact = rng.standard_normal((queries, rows)).astype(np.float32)
    if seed % 3 == 0:
        exact = np.round(exact)  # ties everywhere, more than are kept before they are resolved
    error = np.float32(rng.choice([0, 1e-6, 0.1, 3]))
    errors = np.where(rng.random(exact.shape) < 0.01, np.float32(np.inf), error)
    seen = exact + (rng.uniform(-1, 1, exact.shape) * error * 0.99).astype(np.float32)
    if not error:
        errors = np.zeros_like(exact)
    best = Best(queries, k, lambda which, found: exact[which, found])
    step = int(rng.integers(1, 400))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        best.add(start, seen[:, part], errors[:, part])
    best.finish()
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(best.rows, order)
    np.testing.assert_array_equal(best.scores, np.take_along_axis(exact, order, 1))


def test_few_rows_are_kept():
    """What makes the sweep's memory flat, whether scores are clear-cut or all the same."""
    for scores in (
        np.random.default_rng(0).standard_normal((1, 100_000)).astype(np.float32),
        np.zeros((1, 100_000), "f4"),
    ):
        asked = []

        def exact(which, rows, asked=asked, scores=scores):
            asked.append(len(rows))
            return scores[which, rows]

        best = Best(1, 10, exact)
        for start in range(0, 100_000, 1000):
            best.add(start, scores[:, start : start + 1000], np.full((1, 1000), 1e-6, np.float32))
        best.finish()
        assert max(asked) <= 1276
        assert len(best._rows[0]) == 10
