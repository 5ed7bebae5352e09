"""LESS: training rows whose Adam step is nearest to some task's gradient, over the checkpoints of a training.

Xia et al. 2024 ("LESS: Selecting influential data for targeted instruction tuning"), section 4: with Γ the Adam update
of a row, eq. 4, g the plain gradient of a validation task, and checkpoints c with mean learning rates η_c,

    score(task, i) = Σ_c η_c cos(Π g_task(θ_c), Π Γ(i; θ_c)),

and a row's score for a set of tasks is the largest over them (trace score --score nearest). Queries are the tasks here.
Γ needs the optimiser's second moments, which an ``optimizer.pt`` beside a checkpoint has; without it they are fitted to
the rows. Momentum, equal for all rows, is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from attribute.engine import gradients_of
from attribute.methods._estimator import Estimator, register_estimator
from attribute.methods._study import Checkpoint, Study, cosines
from attribute.normalizing import fit_moments, planned_moments
from gradcore import Normalizer


@register_estimator
class Less(Estimator):
    """Cosines of Adam-scaled sketched gradients, summed over checkpoints."""

    name: ClassVar[str] = "less"
    needs: ClassVar[str] = "a sketch; checkpoints with learning rates follow the training"
    cost: ClassVar[str] = "2 passes a checkpoint"
    source: ClassVar[str] = "Xia et al. 2024, section 4, eqs. 3–5"

    def influence(self, study: Study) -> np.ndarray:
        """Σ_c η_c cos(Π g_q, Π Γ_i)."""
        total = np.zeros((len(study.queries), len(study.rows)), dtype=np.float64)
        for checkpoint in study.checkpoints or (Checkpoint(study.model, 1.0, study.moments),):
            plan = replace(study.sketched, model="", normalizer=None)
            if checkpoint.moments:
                moments = planned_moments(checkpoint.moments, study.plan)
            else:
                moments = fit_moments(checkpoint.model, study.rows, study.plan, budget=study.budget)
            normalizer = Normalizer.of_moments("adam", moments)
            queries = gradients_of(checkpoint.model, study.queries, plan, study.budget)
            rows = gradients_of(checkpoint.model, study.rows, replace(plan, normalizer=normalizer), study.budget)
            total += checkpoint.learning_rate * cosines(queries, rows)
        return total.astype(np.float32)
