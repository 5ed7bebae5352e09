"""DataInf: swap the mean and the inverse, H⁻¹ ≈ 1/N Σ_i (g_i g_iᵀ + λ)⁻¹, each term by Sherman-Morrison.

Kwon et al. 2024 ("DataInf", eq. 5), module by module:

    τ(q, z) = Σ_modules 1/λ [ q·g_z − 1/N Σ_i (q·g_i)(g_i·g_z) / (λ + ‖g_i‖²) ],   λ = c / (N d) Σ_i ‖g_i‖²,  c = 0.1.

The sum over i is a vector a query, so memory is that of the queries. Good for low-rank adapters; the swap is crude for
wide modules, where the result is close to a rescaled dot product.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from attribute._errors import AttributionError
from attribute.engine import RowBlock
from attribute.methods._estimator import GRADIENTS, Estimator, register_estimator
from attribute.methods._study import Study


@register_estimator
class DataInf(Estimator):
    """Closed form by swapping mean and inverse."""

    name: ClassVar[str] = "datainf"
    uses: ClassVar[frozenset[str]] = GRADIENTS | {"damping"}
    cost: ClassVar[str] = "3 passes"
    source: ClassVar[str] = "Kwon et al. 2024, eq. 5"

    def influence(self, study: Study) -> np.ndarray:
        """Mean squared norms, then the correction of each query, then the scores."""
        if not study.damping > 0:
            raise AttributionError("DataInf divides by its damping: it must be positive")
        slices = study.plan.slices
        squares = dict.fromkeys(slices, 0.0)

        def norms(block: RowBlock) -> None:
            for name, columns in slices.items():
                squares[name] += block.gradients[:, columns].double().square().sum().item()

        study.visit(norms)
        count = len(study.rows)
        floors = {
            name: study.damping * squares[name] / count / (columns.stop - columns.start)
            for name, columns in slices.items()
        }
        queries = torch.from_numpy(study.query_gradients).to(study.model.device)
        shift = torch.zeros_like(queries, dtype=torch.float64)

        def correct(block: RowBlock) -> None:
            for name, columns in slices.items():
                rows = block.gradients[:, columns].float()
                weights = (queries[:, columns] @ rows.T) / (floors[name] + rows.square().sum(1)).clamp(min=1e-30)
                shift[:, columns] += weights @ rows

        study.visit(correct)
        directions = queries - (shift / count).float()
        for name, columns in slices.items():
            directions[:, columns] *= 1 / floors[name] if floors[name] > 0 else 0.0
        return study.products(directions.cpu().numpy())
