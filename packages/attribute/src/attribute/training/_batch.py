"""What a trainer says of a batch whose backward pass has just ended, and what keeps the rows that come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from attribute.training._log import RowLog
from gradcore import CapturePlan


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


class RowKind(Protocol):
    """What the rows of a training are: what is said of each in the log, and the store that comes of a log."""

    @property
    def about(self) -> Mapping[str, Any]:
        """JSON that a resumed training must say again."""
        ...

    def lines(self, batch: Batch) -> list[dict[str, Any]]:
        """What is said of each row of a batch, its ``step`` among it."""
        ...

    def write(self, path: Path, plan: CapturePlan, log: RowLog, meta: Mapping[str, Any]) -> None:
        """The store of an epoch that has ended."""

    def read(self, path: Path, step: int) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
        """The rows of a store that came before a step, as they lay in the log it was written from."""
        ...
