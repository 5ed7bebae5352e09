"""What a trainer says of a batch whose backward pass has just ended, and what keeps the rows that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from gradcore import CapturePlan
from gradstore import GradientStore


@dataclass(frozen=True)
class Completion:
    """A completion that a policy sampled, as one optimiser step learnt from it.

    Attributes:
        generation: its number among the completions of its prompt.
        content: its text, or its messages.
        ids: its tokens, without padding.
        reward: the weighted sum of its rewards; ``None`` where no reward function gave one.
        advantage: what the loss of its tokens was weighted by.
        tokens: those that count in the loss.
    """

    generation: int
    content: Any
    ids: list[int]
    reward: float | None
    advantage: float
    tokens: int


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass of a training.

    Attributes:
        rows: int64 ``[n]``, the rows of the dataset that it had.
        scale: what the collected gradients are multiplied with: a number, or one for each row ``[n, 1]``.
        step, epoch, rate: optimiser steps and epochs before it, and the learning rate of its own step.
        completions: of each row, where rows are sampled.
    """

    rows: np.ndarray
    scale: float | Tensor
    step: int
    epoch: float
    rate: float
    completions: Sequence[Completion] = ()


class EpochRecord(Protocol):
    """The rows of one epoch while they come, and their store when all are there."""

    def put(self, batch: Batch, gradients: np.ndarray) -> None:
        """Keep what a batch gave, ``[n, width]``."""

    def finish(self, meta: dict[str, Any]) -> GradientStore:
        """Write the store, and leave the scratch folder away."""
        ...


OpenEpoch = Callable[[Path, CapturePlan, int], EpochRecord]
"""Begins or continues the record of an epoch: the path of its store, what is captured, the first step that comes."""
