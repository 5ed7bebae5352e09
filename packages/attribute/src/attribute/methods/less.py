"""LESS: training rows whose Adam step is nearest to some task's gradient, over the checkpoints of a training.

Xia et al. 2024 ("LESS: Selecting influential data for targeted instruction tuning"), section 4: with Γ the Adam update
of a row, eq. 4, g the plain gradient of a validation task, and checkpoints c with mean learning rates η_c,

    score(task, i) = Σ_c η_c cos(Π g_task(θ_c), Π Γ(i; θ_c)),

and a row's score for a set of tasks is the largest over them. A task's gradient is the mean over its queries, by the
groups of the study; without groups every query is a task. Γ needs the optimiser's second moments, which an
``optimizer.pt`` beside a checkpoint has; without it they are fitted to the rows. Momentum, equal for all rows, is left
out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from attribute._errors import AttributionError
from attribute.engine import gradients_of
from attribute.methods._estimator import GRADIENTS, SKETCH, Estimator, register_estimator
from attribute.methods._study import Checkpoint, Study, cosines
from attribute.normalizing import fit_moments, planned_moments
from gradcore import Normalizer


@register_estimator
class Less(Estimator):
    """Cosines of Adam-scaled sketched gradients, summed over checkpoints."""

    name: ClassVar[str] = "less"
    needs: ClassVar[str] = "a sketch; checkpoints with learning rates follow the training"
    uses: ClassVar[frozenset[str]] = GRADIENTS | SKETCH | {"checkpoints", "moments", "group_column", "nearest"}
    cost: ClassVar[str] = "2 passes a checkpoint"
    source: ClassVar[str] = "Xia et al. 2024, section 4, eqs. 3–5"

    def influence(self, study: Study) -> np.ndarray:
        """Σ_c η_c cos(Π g_task, Π Γ_i) ``[tasks, rows]``; with ``nearest`` the largest over the tasks ``[1, rows]``."""
        if study.checkpoints and study.moments:
            raise AttributionError(
                "less takes the moments of each checkpoint from the optimizer.pt in its folder: leave "
                "--optimizer-state-path away"
            )
        groups = list(dict.fromkeys(study.groups))
        total: np.ndarray | float = 0.0
        asked = np.zeros(0, dtype=bool)
        for checkpoint in study.checkpoints or (Checkpoint(study.model, 1.0, study.moments),):
            plan = replace(study.sketched, model="", normalizer=None)
            if checkpoint.moments:
                moments = planned_moments(checkpoint.moments, study.plan)
            else:
                moments = fit_moments(checkpoint.model, study.rows, study.plan, budget=study.budget)
            normalizer = Normalizer.of_moments("adam", moments)
            queries = gradients_of(checkpoint.model, study.queries, plan, study.budget)
            rows = gradients_of(checkpoint.model, study.rows, replace(plan, normalizer=normalizer), study.budget)
            if groups:  # a sum has the direction of the mean
                queries = np.stack([queries[[each == group for each in study.groups]].sum(0) for group in groups])
            total = total + checkpoint.learning_rate * cosines(queries, rows).astype(np.float64)
            asked = queries.any(1)
        found = np.asarray(total, dtype=np.float32)
        if not study.nearest:
            return found
        # A task without a gradient, such as one of empty queries, is near to nothing.
        return (found[asked] if asked.any() else found).max(0, keepdims=True)
