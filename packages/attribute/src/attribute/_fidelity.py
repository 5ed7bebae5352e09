"""What a run's sketch keeps of its own gradients, and how modules share its floats, before any row is stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from attribute._errors import DataError
from attribute.batching import Batch, assemble
from attribute.data import TokenFile
from attribute.engine import evaluating, factors_of, finite_losses
from attribute.model import LanguageModel
from attribute.spectral import shuffled_rows
from gradcore import (
    CapturePlan,
    Fidelity,
    GradCoreError,
    energies,
    gram_fidelity,
    share_floats,
)

ROWS = 24


class Yardstick:
    """Inner products of the whole gradients of one batch of rows, all modules together, to hold sketches against.

    The rows are drawn at random, not from those a spectral basis is fitted to while there are others, and cut so that
    the batch has about ``budget`` tokens.
    """

    def __init__(self, model: LanguageModel, tokens: TokenFile, plan: CapturePlan, *, budget: int) -> None:
        rows = shuffled_rows(tokens, plan)[::-1][:ROWS]
        self._model, self._batch = model, None
        if len(rows) < 3:
            return
        self._batch = _cut(model, tokens, rows, budget)
        self._exact = torch.zeros(len(rows), len(rows), dtype=torch.double, device=model.device)
        for gradient in factors_of(model, self._batch, plan).values():
            self._exact += gradient.dot(gradient)

    def judge(self, plan: CapturePlan) -> Fidelity | None:
        """How near a plan's rows come.

        Returns:
            ``None`` where it cannot be measured: fewer than three rows with a loss.
        """
        if self._batch is None:
            return None
        with self._model.collector(plan) as collector:
            with torch.enable_grad(), evaluating(self._model):
                finite_losses(self._model, self._batch, plan).sum().backward()
            rows = collector.rows.double()
        try:
            return gram_fidelity(rows @ rows.T, self._exact)
        except GradCoreError:  # the cut left fewer than three rows with a loss
            return None


def share_by_energy(model: LanguageModel, tokens: TokenFile, plan: CapturePlan, *, budget: int) -> CapturePlan:
    """The plan with its floats shared by the modules' part in the gradients of a sample of the rows.

    Raises:
        DataError: no row has a token with a loss.
    """
    rows = shuffled_rows(tokens, plan)[:ROWS]
    if not len(rows):
        raise DataError("floats are shared by the gradients of rows with a loss, and there are none")
    return share_floats(plan, by=energies(factors_of(model, _cut(model, tokens, rows, budget), plan).values()))


def _cut(model: LanguageModel, tokens: TokenFile, rows: np.ndarray, budget: int) -> Batch:
    """Rows as one batch of about ``budget`` tokens."""
    batch = assemble(tokens, rows, model.device)
    width = max(2, budget // len(rows))
    return replace(batch, input_ids=batch.input_ids[:, :width], labels=batch.labels[:, :width])
