"""Rows under the second moments of the optimiser that is at work, those of the very step that a row was in.

Adam divides the gradient of step t by ``√v̂_t + ε``, and ``v_t`` knows that gradient (Kingma & Ba 2015, algorithm 1). So
the factors of a step's rows are held until the optimiser has made it, the first step as any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attribute._errors import ModelError
from attribute.training._batch import Batch
from gradcore import CapturePlan, ModuleGradient, ModulePlan, Normalizer, optimizer_moments
from gradcore.normalizers import BoundNormalizer, adam
from gradcore.sketches import BoundSketch


class HeldStep:
    """The factors of the batches of one optimiser step.

    Example::

        held = HeldStep(plan)
        with GradientCollector(model, replace(plan, sketch=Identity()), factors=held.receive, freeze=False):
            loss.backward()
        held.close(batch)
        optimizer.step()
        for batch, rows in held.rows(model, optimizer):    # [n, plan.width]
            …

    Args:
        plan: what is kept of the rows, once they are scaled.
    """

    def __init__(self, plan: CapturePlan) -> None:
        self._plan = plan
        self._planned = {each.name: each for each in plan.modules}
        self._bound: dict[str, BoundSketch] = {}
        self._arrived: list[ModuleGradient] = []
        self._batches: list[tuple[Batch, list[ModuleGradient]]] = []

    def receive(self, gradient: ModuleGradient) -> None:
        """A module's gradients of the batch that is at work, for a collector's ``factors``."""
        self._arrived.append(gradient)

    def close(self, batch: Batch) -> None:
        """The batch is over."""
        self._batches.append((batch, self._arrived))
        self._arrived = []

    def forget(self) -> None:
        """The step failed: nothing of it counts."""
        self._arrived, self._batches = [], []

    def rows(
        self, model: nn.Module, optimizer: Any, outside: Mapping[str, nn.Module] | None = None
    ) -> Iterator[tuple[Batch, Tensor]]:
        """The batches with their rows ``[n, width]``, multiplied with ``1 / (√v̂ + ε)`` and sketched; then none is held.

        Args:
            model: within which the captured modules lie.
            optimizer: live, its step made. One that gradient scaling skipped changed no weight: rows are zero.
            outside: captured modules that lie elsewhere, by the names they have in the plan.

        Raises:
            GradCoreError: an optimiser without second moments, or with such of 8 bits.
            ModelError: a module whose rows came has none.
        """
        batches, self._batches = self._batches, []
        skipped = getattr(optimizer, "step_was_skipped", False)
        normalizer = None if skipped else _adam(model, optimizer, outside)
        scales: dict[str, BoundNormalizer] = {}
        for batch, gradients in batches:
            count = len(batch.rows)
            rows = torch.zeros(count, self._plan.width)
            for each in gradients if normalizer is not None else ():
                assert normalizer is not None
                if each.first + len(each) > count:
                    raise ModelError(
                        f"a batch of {count} rows gave {each.first + len(each)} gradients of {each.name}: rows that "
                        "are packed or repeated cannot be told apart"
                    )
                self._add(rows[each.first :], each, normalizer, scales)
            yield batch, rows

    def _add(
        self, rows: Tensor, gradient: ModuleGradient, normalizer: Normalizer, scales: dict[str, BoundNormalizer]
    ) -> None:
        """Add a module's gradients to the rows from its first example on; modules are bound when they first come."""
        planned = self._planned[gradient.name]
        columns = self._plan.slices[self._plan.column_of(planned.name)]
        for examples, block in gradient.blocks():
            if planned.name not in self._bound:
                self._bound[planned.name] = self._plan.sketch.bind(
                    planned.name, planned.out_features, planned.in_features, block.device, planned.elementwise
                )
            if planned.name not in scales:
                scales[planned.name] = _bind(normalizer, planned, block.device)
            sketch, scaled = self._bound[planned.name], scales[planned.name].multiply(block)
            kept = sketch.vector(scaled) if planned.elementwise else sketch.matrix(scaled)
            rows[examples, columns] += kept.flatten(1).cpu()


def _adam(model: nn.Module, optimizer: Any, outside: Mapping[str, nn.Module] | None) -> Normalizer:
    """Without its digest: it serves one step, and no plan names it."""
    corrected = all("betas" in group for group in optimizer.param_groups)
    moments = optimizer_moments(model, optimizer, outside=outside, bias_corrected=corrected)
    return Normalizer("adam", scales={name: adam(moment) for name, moment in moments.items()})


def _bind(normalizer: Normalizer, planned: ModulePlan, device: torch.device) -> BoundNormalizer:
    if planned.matrix not in normalizer.scales:
        raise ModelError(
            f"the optimiser has no second moments of {planned.matrix}, which is captured: it does not train it. Name "
            "in modules=… those that it trains"
        )
    return normalizer.bind(planned, device)
