"""Ranks with ties averaged, and the rank correlation they give."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis, from 1, ties sharing their mean.

    >>> ranks(np.array([0.2, 0.9, 0.2]))
    array([1.5, 3. , 1.5])
    """
    if values.ndim > 1:
        return np.stack([ranks(column) for column in values.reshape(len(values), -1).T], axis=1).reshape(values.shape)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def column_spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each column of two matrices ``[n, q]``, ``[q]``; 0 where one side is constant.

    >>> column_spearman(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [4.0], [9.0]]))
    array([1.])
    """
    centred = [found - found.mean(0) for found in (ranks(left), ranks(right))]
    norms = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    return np.divide((centred[0] * centred[1]).sum(0), norms, out=np.zeros_like(norms), where=norms > 0)
