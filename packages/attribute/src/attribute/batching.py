"""Batches of bounded padded size: rows sorted by length inside a window, packed greedily.

A window is a shard of the store, so a batch never crosses shards: a resumed run meets the very batches an
uninterrupted one would have, and finished shards come out equal to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attribute.data import TokenFile
from gradcore import IGNORE


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: ``rows [n]`` (numbers), ``input_ids [n, s]``, ``labels [n, s]`` with −100 where no loss is.

    ``weights [n]`` multiply the losses, where rows have some. What comes of an ``idle`` batch counts for nothing: it
    runs only because a model that is spread over processes needs all of them.
    """

    rows: np.ndarray
    input_ids: Tensor
    labels: Tensor
    tokens: int
    weights: Tensor | None = None
    idle: bool = False


def plan_batches(lengths: np.ndarray, rows: np.ndarray, budget: int) -> list[np.ndarray]:
    """Which of the rows run together: longest · count ≤ budget, a longer row alone.

    >>> import numpy as np
    >>> [batch.tolist() for batch in plan_batches(np.array([5, 1, 4, 2]), np.arange(4), budget=8)]
    [[1, 3], [2], [0]]
    """
    order = rows[np.argsort(lengths[rows], kind="stable")]
    batches: list[np.ndarray] = []
    first = 0
    for place, row in enumerate(order):
        # Sorted by length, so the newest row is the longest.
        if place > first and max(int(lengths[row]), 1) * (place - first + 1) > budget:
            batches.append(order[first:place])
            first = place
    if first < len(order):
        batches.append(order[first:])
    return batches


def assemble(tokens: TokenFile, rows: Sequence[int] | np.ndarray, device: torch.device) -> Batch:
    """Read a batch from the token file and pad it on the right.

    Padding comes after every real token, so causal attention never sees it and no mask is needed.
    """
    lengths = [int(tokens.offsets[row + 1] - tokens.offsets[row]) for row in rows]
    width = max(2, *lengths) if lengths else 2
    ids = np.zeros((len(lengths), width), dtype=np.int64)
    labels = np.full((len(lengths), width), IGNORE, dtype=np.int64)
    for place, row in enumerate(rows):
        found = tokens.ids(row).astype(np.int64)  # unsigned on disk, and −100 is not
        ids[place, : len(found)] = found
        labels[place, : len(found)] = np.where(tokens.labelled(row), found, IGNORE)
    return Batch(
        rows=np.asarray(rows),
        input_ids=torch.from_numpy(ids).to(device),
        labels=torch.from_numpy(labels).to(device),
        tokens=sum(lengths),
        weights=None if tokens.weights is None else torch.from_numpy(tokens.weights[np.asarray(rows)]).to(device),
    )
