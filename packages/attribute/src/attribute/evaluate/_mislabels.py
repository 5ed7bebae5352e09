"""Finding rows whose labels are wrong: the area under the ROC curve of any score of rows."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from attribute._errors import DataError
from attribute.evaluate._ranks import ranks
from attribute.evaluate._retrieval import Estimate


def mislabel_auc(scores: np.ndarray, wrong: Collection[int], *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Chance that a wrong row has the higher score of a wrong and a right one; ties count half (Mann & Whitney 1947).

    >>> mislabel_auc(np.array([0.9, 0.1, 0.5]), {0}).mean
    1.0

    Args:
        scores: a number a row, high where a label is suspected; self-influence and the loss are such.
        wrong: the rows that are known to be wrong.
        draws, seed: of the bootstrap, which draws wrong and right rows apart.

    Raises:
        DataError: no wrong row, or none that is right.
    """
    marked = np.zeros(len(scores), dtype=bool)
    marked[list(wrong)] = True
    if marked.all() or not marked.any():
        raise DataError(f"{marked.sum()} of {len(scores)} rows are wrong: both kinds are needed")
    bad, good = scores[marked], scores[~marked]
    generator = np.random.default_rng(seed)
    found = [_auc(generator.choice(bad, len(bad)), generator.choice(good, len(good))) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(_auc(bad, good), float(low), float(high))


def _auc(bad: np.ndarray, good: np.ndarray) -> float:
    placed = ranks(np.concatenate([bad, good]))[: len(bad)].sum()
    return float((placed - len(bad) * (len(bad) + 1) / 2) / (len(bad) * len(good)))
