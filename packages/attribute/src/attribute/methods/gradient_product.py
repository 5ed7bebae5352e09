"""Grad-dot and grad-cos over a study: the two first-order methods without curvature."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from attribute.methods._estimator import Estimator, register_estimator
from attribute.methods._study import Study


@register_estimator
class GradientDot(Estimator):
    """⟨g_q, g_i⟩."""

    name: ClassVar[str] = "grad-dot"
    cost: ClassVar[str] = "1 pass"
    source: ClassVar[str] = "Pruthi et al. 2020, eq. 1"

    def influence(self, study: Study) -> np.ndarray:
        """One score a query and row."""
        return study.products(study.query_gradients)


@register_estimator
class GradientCosine(Estimator):
    """⟨g_q, g_i⟩ / ‖g_q‖‖g_i‖."""

    name: ClassVar[str] = "grad-cos"
    cost: ClassVar[str] = "1 pass"
    source: ClassVar[str] = "Barshan et al. 2020"

    def influence(self, study: Study) -> np.ndarray:
        """Cosine of whole gradients."""
        norms = np.linalg.norm(study.query_gradients, axis=1, keepdims=True)
        return study.products(study.query_gradients / np.maximum(norms, 1e-30), unit_rows=True)
