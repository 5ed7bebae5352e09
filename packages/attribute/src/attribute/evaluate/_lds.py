"""The linear datamodelling score: do summed scores foretell what retraining without the rows does?

Park et al. 2023 (TRAK), definition 2.3: over random subsets S of the training rows, Spearman's correlation between the
predicted Σ_{i ∉ S} score(q, i) and the measured loss of q after training on S, mean over queries. A positive score is a
proponent, so that dropping it raises the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attribute.evaluate._ranks import column_spearman
from attribute.evaluate._retrieval import Estimate
from attribute.evaluate._truth import Bank

_DRAWS = 500


@dataclass(frozen=True)
class LdsResult:
    """One method on one bank.

    Attributes:
        bank: its name.
        score: mean over queries, with the 95 % interval of a bootstrap over subsets and queries.
        per_query: ``[queries]``.
    """

    bank: str
    score: Estimate
    per_query: np.ndarray


def linear_datamodelling_score(bank: Bank, base: np.ndarray, scores: np.ndarray, *, seed: int = 0) -> LdsResult:
    """LDS of scores ``[queries, rows]``.

    >>> bank = Bank("50", np.array([[1, 0], [0, 1], [0, 0]], bool), np.array([[1.0], [2.0], [3.0]]))
    >>> linear_datamodelling_score(bank, np.array([0.5]), np.array([[2.0, 1.0]])).score.mean
    1.0

    Args:
        bank: the retrainings.
        base: losses of the trained model ``[queries]``.
        scores: positive where training on a row lowers the query's loss.
        seed: of the bootstrap.
    """
    predicted = (~bank.kept).astype(np.float64) @ scores.T.astype(np.float64)  # [subsets, queries]
    actual = bank.losses - base
    return _scored(bank.name, predicted, actual, seed)


def noise_ceiling(bank: Bank, base: np.ndarray, *, seed: int = 0) -> LdsResult | None:
    """What the retrainings themselves would score, made again with another seed: no method can be asked for more.

    Returns:
        ``None`` where the bank was made with one seed.
    """
    if bank.again is None:
        return None
    return _scored(bank.name, bank.again - base, bank.losses - base, seed)


def _scored(name: str, predicted: np.ndarray, actual: np.ndarray, seed: int) -> LdsResult:
    per_query = column_spearman(predicted, actual)
    generator = np.random.default_rng(seed)
    subsets, queries = actual.shape
    means = []
    for _ in range(_DRAWS):
        some, asked = generator.integers(0, subsets, subsets), generator.integers(0, queries, queries)
        means.append(column_spearman(predicted[some][:, asked], actual[some][:, asked]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return LdsResult(name, Estimate(float(per_query.mean()), float(low), float(high)), per_query)
