"""What a run's sketch keeps of its own gradients, measured before the first row is stored."""

from __future__ import annotations

from dataclasses import replace

import torch

from attribute.batching import assemble
from attribute.data import TokenFile
from attribute.engine import evaluating, finite_losses
from attribute.model import LanguageModel
from attribute.spectral import shuffled_rows
from gradcore import (
    CapturePlan,
    Fidelity,
    GradCoreError,
    Identity,
    ModuleGradient,
    gram_fidelity,
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
        batch = assemble(tokens, rows, model.device)
        width = max(2, budget // len(rows))
        self._batch = replace(batch, input_ids=batch.input_ids[:, :width], labels=batch.labels[:, :width])
        self._exact = torch.zeros(len(rows), len(rows), dtype=torch.double, device=model.device)

        held: dict[str, list[ModuleGradient]] = {}

        def hold(gradient: ModuleGradient) -> None:
            held.setdefault(gradient.name, []).append(gradient)

        with model.collector(replace(plan, sketch=Identity()), factors=hold):
            self._run(plan)
        for parts in held.values():
            gradient = ModuleGradient.joined(parts)
            self._exact += gradient.dot(gradient)

    def judge(self, plan: CapturePlan) -> Fidelity | None:
        """How near a plan's rows come.

        Returns:
            ``None`` where it cannot be measured: fewer than three rows with a loss.
        """
        if self._batch is None:
            return None
        with self._model.collector(plan) as collector:
            self._run(plan)
            rows = collector.rows.double()
        try:
            return gram_fidelity(rows @ rows.T, self._exact)
        except GradCoreError:  # the cut left fewer than three rows with a loss
            return None

    def _run(self, plan: CapturePlan) -> None:
        assert self._batch is not None
        with torch.enable_grad(), evaluating(self._model):
            finite_losses(self._model, self._batch, plan).sum().backward()
