"""What a run's sketch keeps of its own gradients, measured before the first row is stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attribute.batching import Batch, assemble
from attribute.data import TokenFile
from attribute.engine import evaluating, finite_losses
from attribute.model import LanguageModel
from attribute.spectral import shuffled_rows
from gradcore import CapturePlan, Fidelity, GradCoreError, GradientCollector, Identity, gram_fidelity

ROWS = 24
_WHOLE_FLOATS = 1 << 27
"""Floats of whole gradients of one module that may exist at once."""


def sketch_fidelity(model: LanguageModel, tokens: TokenFile, plan: CapturePlan, *, budget: int) -> Fidelity | None:
    """Compare sketched with whole gradients of one batch of rows, all modules together.

    The rows are drawn at random, not from those a spectral basis is fitted to while there are others, and cut so that
    the batch has about ``budget`` tokens.

    Returns:
        ``None`` where it cannot be measured: fewer than three rows with a loss, or a module whose whole gradients do
        not fit into memory.
    """
    largest = max(module.out_features * module.in_features for module in plan.modules)
    count = min(ROWS, _WHOLE_FLOATS // largest)
    rows = shuffled_rows(tokens, plan)[::-1][:count]
    if len(rows) < 3:
        return None
    batch = assemble(tokens, rows, model.device)
    width = max(2, budget // len(rows))
    batch = replace(batch, input_ids=batch.input_ids[:, :width], labels=batch.labels[:, :width])
    exact = torch.zeros(len(rows), len(rows), dtype=torch.double, device=model.device)

    def add(_: str, gradient: Tensor) -> None:
        flat = gradient.flatten(1).float()
        exact.add_(flat @ flat.T)

    with torch.enable_grad(), evaluating(model):
        with GradientCollector(model.base, replace(plan, sketch=Identity()), add):
            _run(model, batch, plan)
        with GradientCollector(model.base, plan) as collector:
            _run(model, batch, plan)
            sketched = collector.rows.double()
    try:
        return gram_fidelity(sketched @ sketched.T, exact)
    except GradCoreError:  # the cut left fewer than three rows with a loss
        return None


def _run(model: LanguageModel, batch: Batch, plan: CapturePlan) -> None:
    finite_losses(model, batch, plan.reduction).sum().backward()
