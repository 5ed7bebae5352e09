"""Do two runs, of other seeds or settings, say the same?"""

from __future__ import annotations

import numpy as np

from attribute._errors import DataError
from attribute.evaluate._ranks import column_spearman
from attribute.evaluate._retrieval import Estimate, bootstrap


def score_stability(one: np.ndarray, other: np.ndarray) -> Estimate:
    """Spearman's correlation over rows of the scores ``[queries, rows]`` of two runs, mean over queries.

    >>> score_stability(np.array([[1.0, 2.0, 3.0]]), np.array([[10.0, 20.0, 30.0]])).mean
    1.0

    Raises:
        DataError: they are of other queries or rows.
    """
    if one.shape != other.shape:
        raise DataError(f"scores of {list(one.shape)} and {list(other.shape)} (queries, rows) cannot be compared")
    return bootstrap(column_spearman(one.T, other.T).tolist())
