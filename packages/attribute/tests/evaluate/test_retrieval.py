"""Retrieval measures on examples worked by hand."""

import numpy as np
import pytest

from attribute._errors import DataError
from attribute.evaluate import bootstrap, evaluate_rankings, rank, recall_at, reciprocal_rank


@pytest.mark.parametrize(
    ("ranking", "planted", "expected"),
    [
        ([4, 9, 2], {4}, 1.0),
        ([4, 9, 2], {2, 9}, 1 / 2),  # the first of several counts
        ([4, 9, 2], {2}, 1 / 3),
        ([4, 9, 2], {7}, 0.0),  # cut off or never ranked
        ([], {7}, 0.0),
    ],
)
def test_reciprocal_rank(ranking, planted, expected):
    assert reciprocal_rank(ranking, planted) == expected


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, 0.0), (2, 1 / 3), (3, 1 / 3), (4, 2 / 3), (99, 2 / 3)],  # of rows 1, 5 and 8, row 8 is never ranked
)
def test_recall(k, expected):
    assert recall_at(k, [0, 5, 2, 1, 3], {1, 5, 8}) == expected


def test_means_over_queries():
    quality = evaluate_rankings("toy", [[0, 1, 2, 3], [3, 2, 1, 0]], [(0, 1), (0, 2)], ks=(1, 2, 4))
    assert (quality.method, quality.queries) == ("toy", 2)
    assert quality.mrr.mean == (1 + 1 / 2) / 2
    assert [(each.k, each.share.mean) for each in quality.recall] == [(1, 0.25), (2, 0.75), (4, 1.0)]


def test_rank_sorts_downwards_and_keeps_the_order_of_ties():
    assert rank([1.0, 3.0, 1.0, 3.0, -2.0]) == [1, 3, 0, 2, 4]
    scores = np.random.default_rng(0).normal(size=50)
    assert np.all(np.diff(scores[rank(scores)]) <= 0)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        estimate = bootstrap(generator.random(60), level=0.9, resamples=400, seed=seed)
        assert estimate.low <= estimate.mean <= estimate.high
        inside += estimate.low <= 0.5 <= estimate.high
    assert 0.8 < inside / 200 < 0.97


def test_bootstrap_narrows_with_the_root_of_the_sample():
    values = np.random.default_rng(2).random(1600)
    wide, narrow = bootstrap(values[:100]), bootstrap(values)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.25)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="2 rankings, 1 sets"):
        evaluate_rankings("toy", [[0], [1]], [{0}])
    with pytest.raises(DataError, match="0 rankings"):
        evaluate_rankings("toy", [], [])
    with pytest.raises(DataError, match="without planted rows"):
        reciprocal_rank([1], set())
    with pytest.raises(DataError, match="twice"):
        reciprocal_rank([1, 1], {1})
    with pytest.raises(DataError, match="at least 1, not 0"):
        recall_at(0, [1], {1})
