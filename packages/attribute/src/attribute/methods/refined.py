"""EK-FAC refined by conjugate gradients, and LiSSA: influence under the exact Gauss-Newton matrix of a sample of rows.

Both solve (H + D) x = g_q with D the damping of each module, relative to the mean of its EK-FAC spectrum, and score
⟨x, g_i⟩. CG is preconditioned by EK-FAC and starts from its solution (ASTRA, Wang et al. 2025, arXiv 2507.14740,
section 3, on one fixed sample). LiSSA (Agarwal et al. 2017; Koh & Liang 2017, section 3) is the Neumann series
x ← x + (g_q − (H + D) x) / s, with s from a power iteration, and converges slowly where H is ill-conditioned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attribute.batching import assemble, plan_batches
from attribute.curvature import Inversion
from attribute.curvature._factors import rows_with_loss
from attribute.curvature._gauss_newton import GaussNewton
from attribute.methods._estimator import FISHER, GRADIENTS, Estimator, register_estimator
from attribute.methods._study import Study

Multiply = Callable[[Tensor], Tensor]
_SOLVED = GRADIENTS | FISHER | {"damping", "solver_rows", "solver_steps"}


def gauss_newton(study: Study) -> GaussNewton:
    """The Gauss-Newton matrix of ``study.solver_rows`` evenly spaced rows."""
    rows = rows_with_loss(study.rows, study.solver_rows)
    batches = [
        assemble(study.rows, each, study.model.device) for each in plan_batches(study.rows.lengths, rows, study.budget)
    ]
    return GaussNewton(study.model, study.plan, batches)


def damped_product(study: Study) -> tuple[Multiply, Tensor]:
    """x ↦ (H + D) x, and the diagonal D ``[width]``: each module's damping."""
    matrix = gauss_newton(study)
    diagonal = torch.zeros(study.plan.width)
    for name, module in study.curvature("ekfac").modules.items():
        diagonal[study.plan.slices[name]] = study.damping * module.eigenvalues.mean().item()
    diagonal = diagonal.to(study.model.device)
    return lambda x: matrix.multiply(x) + diagonal * x, diagonal


def conjugate_gradients(multiply: Multiply, precondition: Multiply, right: Tensor, start: Tensor, steps: int) -> Tensor:
    """Preconditioned CG for each row of ``right [q, width]`` at once."""
    x = start.clone()
    residual = right - multiply(x)
    z = precondition(residual)
    p, inner = z.clone(), (residual * z).sum(1)
    for _ in range(steps):
        product = multiply(p)
        curvature = (p * product).sum(1)
        # A row that has converged has nothing left to divide by.
        alpha = torch.where(curvature > 0, inner / curvature.clamp(min=1e-30), 0.0)[:, None]
        x += alpha * p
        residual -= alpha * product
        z = precondition(residual)
        following = (residual * z).sum(1)
        p = z + torch.where(inner > 0, following / inner.clamp(min=1e-30), 0.0)[:, None] * p
        inner = following
    return x


def neumann(multiply: Multiply, right: Tensor, steps: int) -> Tensor:
    """LiSSA's series for each row of ``right [q, width]``; zero for a row of zeros."""
    some = right[right.any(dim=1)][:1]
    if not len(some):
        return torch.zeros_like(right)
    probe, scale = some / some.norm(), 1.0
    for _ in range(10):
        product = multiply(probe)
        scale = product.norm().item()
        probe = product / scale
    x = right / (1.1 * scale)
    for _ in range(steps):
        x += (right - multiply(x)) / (1.1 * scale)
    return x


@register_estimator
class EkfacCg(Estimator):
    """CG on the exact Gauss-Newton matrix, from EK-FAC's solution and preconditioned by it."""

    name: ClassVar[str] = "ek-fac-cg"
    needs: ClassVar[str] = "factors over the rows (fitted); whole gradients"
    uses: ClassVar[frozenset[str]] = _SOLVED
    cost: ClassVar[str] = "3 passes + solver"
    source: ClassVar[str] = "Wang et al. 2025 (ASTRA), section 3"

    def influence(self, study: Study) -> np.ndarray:
        """⟨(H + D)⁻¹ g_q, g_i⟩."""
        multiply, _ = damped_product(study)
        curvature, inversion = study.curvature("ekfac"), Inversion("damped", study.damping)

        def precondition(x: Tensor) -> Tensor:
            return torch.from_numpy(curvature.apply(x.cpu(), inversion)).to(x.device)

        right = torch.from_numpy(study.query_gradients).to(study.model.device)
        found = conjugate_gradients(multiply, precondition, right, precondition(right), study.solver_steps)
        return study.products(found.cpu().numpy())


@register_estimator
class Lissa(Estimator):
    """The Neumann series on the exact Gauss-Newton matrix."""

    name: ClassVar[str] = "lissa"
    needs: ClassVar[str] = "factors over the rows for the damping (fitted); whole gradients"
    uses: ClassVar[frozenset[str]] = _SOLVED
    cost: ClassVar[str] = "3 passes + solver"
    source: ClassVar[str] = "Agarwal et al. 2017; Koh & Liang 2017, section 3"

    def influence(self, study: Study) -> np.ndarray:
        """⟨(H + D)⁻¹ g_q, g_i⟩."""
        multiply, _ = damped_product(study)
        right = torch.from_numpy(study.query_gradients).to(study.model.device)
        return study.products(neumann(multiply, right, study.solver_steps).cpu().numpy())
