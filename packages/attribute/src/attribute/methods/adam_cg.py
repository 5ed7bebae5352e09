"""Influence on a training by Adam: EK-FAC refined by conjugate gradients, with Adam's own metric for damping.

Adam moves in the metric R = diag(√v). Linearised at its end, over learning rates that sum to T, it has made of what a
row contributed, for a query,

    g_qᵀ R^-½ f(R^-½ H R^-½) R^-½ g_i,        f(σ) = (1 − e^{−Tσ}) / σ ≈ 1 / (σ + 1 / T),

H the Gauss-Newton matrix of the mean loss (Bae et al. 2024, "SOURCE", section 3, with one segment): that is
τ = g_qᵀ (H + R / T)⁻¹ g_i. What training had no time to learn is damped, and what Adam moves in small steps is damped
more; no damping is left to choose.

(H + R / T) x = g_q is solved on the exact Gauss-Newton matrix of a sample of rows, preconditioned by EK-FAC with each
module damped by its mean of R / T. Momentum and weight decay are left out. A training whose gradients at its end say
little about those on its way is not described.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError
from attribute.curvature import Inversion
from attribute.methods._estimator import FISHER, GRADIENTS, Estimator, register_estimator
from attribute.methods._study import Study
from attribute.methods.refined import conjugate_gradients, gauss_newton
from attribute.normalizing import fit_moments, planned_moments

EPSILON = 1e-8
"""Beside √v, as Adam has it."""


def adam_damping(study: Study) -> Tensor:
    """D = (√v + ε) / T ``[width]``, in the units of the study's losses.

    Raises:
        AttributionError: the horizon, or both the optimiser's moments and the batch, were not given.
    """
    if not study.horizon > 0:
        raise AttributionError(
            "adam-cg needs the sum of the training's learning rates over its steps, --horizon: with a linear decay to "
            "0, half the peak times the steps. A Trainer's checkpoint, given as --optimizer-state-path, tells it"
        )
    # Adam's moments are of a batch's mean loss, a row's loss here may be a sum over its tokens.
    scale = 1.0 if study.plan.reduction == "mean" else mean_tokens(study)
    if study.moments and study.batch:
        raise AttributionError("adam-cg has the optimiser's moments: leave --train-batch-size away")
    if study.moments:
        moments, unit = planned_moments(study.moments, study.plan), scale
    elif study.batch:
        fit = {"batch": study.batch, "budget": study.budget, "progress": study.progress}
        moments, unit = fit_moments(study.model, study.rows, study.plan, **fit), 1.0
    else:
        raise AttributionError(
            "adam-cg needs Adam's second moments: --optimizer-state-path, or --train-batch-size to work them out"
        )
    root = torch.cat([moments[each.path].sqrt().flatten() for each in study.plan.modules])
    return (unit * root + scale * EPSILON) / study.horizon


def mean_tokens(study: Study) -> float:
    """Tokens with a loss a row, mean over the rows that have any."""
    counts = np.array([study.rows.labelled(row)[1:].sum() for row in range(len(study.rows))])
    return float(counts[counts > 0].mean())


@register_estimator
class AdamCg(Estimator):
    """CG on the exact Gauss-Newton matrix, damped in the metric of Adam."""

    name: ClassVar[str] = "adam-cg"
    needs: ClassVar[str] = (
        "the training's Σ of learning rates and its optimiser's moments or batch size; factors (fitted)"
    )
    uses: ClassVar[frozenset[str]] = GRADIENTS | FISHER | {"horizon", "batch", "moments", "solver_rows", "solver_steps"}
    cost: ClassVar[str] = "4 passes + solver"
    source: ClassVar[str] = "Bae et al. 2024 (SOURCE), section 3; Wang et al. 2025 (ASTRA), section 3"

    def influence(self, study: Study) -> np.ndarray:
        """⟨(H + D)⁻¹ g_q, g_i⟩."""
        device, plan = study.model.device, study.plan
        damping = adam_damping(study).to(device)
        curvature, matrix = study.curvature("ekfac"), gauss_newton(study)
        inversions = {
            name: Inversion("absolute", damping[columns].mean().item()) for name, columns in plan.slices.items()
        }

        def precondition(x: Tensor) -> Tensor:
            return torch.from_numpy(curvature.apply(x.cpu(), inversions)).to(device)

        def multiply(x: Tensor) -> Tensor:
            return matrix.multiply(x) + damping * x

        right = torch.from_numpy(study.query_gradients).to(device)
        found = conjugate_gradients(multiply, precondition, right, precondition(right), study.solver_steps)
        return study.products(found.cpu().numpy())
