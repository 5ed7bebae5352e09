"""TracIn: Σ_checkpoints η ⟨g_q, g_i⟩, a training's own first-order record of what each row did to the query's loss.

Pruthi et al. 2020 ("Estimating training data influence by tracing gradient descent", eq. 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from attribute._errors import AttributionError
from attribute.engine import gradients_of
from attribute.methods._estimator import GRADIENTS, Estimator, register_estimator
from attribute.methods._study import Study


@register_estimator
class TracIn(Estimator):
    """Dot products summed over checkpoints, weighted by learning rate."""

    name: ClassVar[str] = "tracin"
    needs: ClassVar[str] = "checkpoints with learning rates"
    uses: ClassVar[frozenset[str]] = GRADIENTS | {"checkpoints"}
    cost: ClassVar[str] = "1 pass a checkpoint"
    source: ClassVar[str] = "Pruthi et al. 2020, eq. 1"

    def influence(self, study: Study) -> np.ndarray:
        """Σ_c η_c ⟨g_q(θ_c), g_i(θ_c)⟩."""
        if not study.checkpoints:
            raise AttributionError("tracin follows a training: give checkpoints with their learning rates")
        total = np.zeros((len(study.queries), len(study.rows)), dtype=np.float64)
        for checkpoint in study.checkpoints:
            plan = replace(study.plan, model="")
            queries = gradients_of(checkpoint.model, study.queries, plan, study.budget)
            total += checkpoint.learning_rate * study.products(queries, model=checkpoint.model)
        return total.astype(np.float32)
