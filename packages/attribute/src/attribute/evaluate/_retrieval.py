"""How well a ranking finds planted documents: reciprocal rank and recall, with bootstrap intervals over queries."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from attribute._errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A mean over queries with a bootstrap interval around it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Recall:
    """Share of a query's planted documents among its first ``k`` rows."""

    k: int
    share: Estimate


@dataclass(frozen=True)
class Quality:
    """What a method reaches over all queries."""

    method: str
    queries: int
    mrr: Estimate
    recall: tuple[Recall, ...]


def evaluate_rankings(
    method: str,
    rankings: Sequence[Sequence[int]],
    planted: Sequence[Collection[int]],
    *,
    ks: Sequence[int] = (10,),
) -> Quality:
    """MRR and recall@k of one method.

    >>> quality = evaluate_rankings("mine", [[7, 3, 5], [2, 0, 1]], [{3, 5}, {2}], ks=[2])
    >>> quality.mrr.mean, quality.recall[0].share.mean
    (0.75, 0.75)

    Args:
        method: the name to print beside the figures.
        rankings: per query its rows, best first; they may be cut off, and what is cut off counts as not found.
        planted: per query the rows that ought to be found.
        ks: where recall is read off.

    Raises:
        DataError: no queries, unequal counts, a query without planted rows, a row ranked twice, or a k below 1.
    """
    if not rankings or len(rankings) != len(planted):
        raise DataError(f"expected planted rows for each ranking, found {len(rankings)} rankings, {len(planted)} sets")
    pairs = list(zip(rankings, planted))
    return Quality(
        method,
        len(rankings),
        mrr=bootstrap([reciprocal_rank(ranking, rows) for ranking, rows in pairs]),
        recall=tuple(Recall(k, bootstrap([recall_at(k, ranking, rows) for ranking, rows in pairs])) for k in ks),
    )


def reciprocal_rank(ranking: Sequence[int], planted: Collection[int]) -> float:
    """1 / (place of the first planted row), counted from 1; 0 if none is ranked.

    >>> reciprocal_rank([7, 3, 5], {3, 5})
    0.5
    """
    _check(ranking, planted)
    return next((1 / place for place, row in enumerate(ranking, start=1) if row in planted), 0.0)


def recall_at(k: int, ranking: Sequence[int], planted: Collection[int]) -> float:
    """Share of the planted rows among the first ``k``; with fewer places than planted rows it stays below 1.

    >>> recall_at(2, [7, 3, 5], {3, 5})
    0.5
    """
    if k < 1:
        raise DataError(f"recall@k needs k of at least 1, not {k}")
    _check(ranking, planted)
    return len(set(ranking[:k]) & set(planted)) / len(set(planted))


def rank(scores: ArrayLike) -> list[int]:
    """Rows by falling score; of equal scores the earlier row first.

    >>> rank([0.1, 0.9, 0.1])
    [1, 0, 2]
    """
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist()


def bootstrap(values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean with the percentile interval of Efron & Tibshirani 1993, ch. 13, resampling queries.

    >>> bootstrap([1.0, 1.0, 1.0])
    Estimate(mean=1.0, low=1.0, high=1.0)
    """
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(sample.mean()), float(low), float(high))


def _check(ranking: Sequence[int], planted: Collection[int]) -> None:
    if not planted:
        raise DataError("a query without planted rows has no rank to measure: leave it out")
    if len(set(ranking)) != len(ranking):
        raise DataError("a row stands twice in a ranking")
