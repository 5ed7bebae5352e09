"""Self-influence g_iᵀ H⁻¹ g_i under EK-FAC: how much a row changes its own loss, whatever the query.

Koh & Liang 2017, section 5.4: mislabelled and atypical rows stand out. A control beside pairwise methods.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from attribute.curvature import Inversion
from attribute.engine import RowBlock
from attribute.methods._estimator import FISHER, GRADIENTS, Estimator, register_estimator
from attribute.methods._study import Study


@register_estimator
class SelfInfluence(Estimator):
    """‖H^-½ g_i‖²."""

    name: ClassVar[str] = "self-influence"
    needs: ClassVar[str] = "factors over the rows (fitted)"
    uses: ClassVar[frozenset[str]] = GRADIENTS | FISHER | {"damping"}
    cost: ClassVar[str] = "3 passes"
    source: ClassVar[str] = "Koh & Liang 2017, section 5.4"

    def influence(self, study: Study) -> np.ndarray:
        """The same for every query."""
        curvature, half = study.curvature("ekfac"), Inversion("damped", study.damping, -0.5)
        found = np.zeros(len(study.rows), dtype=np.float32)

        def add(block: RowBlock) -> None:
            found[block.rows] = np.square(curvature.apply(block.gradients.cpu(), half)).sum(1)

        study.visit(add)
        return np.repeat(found[None], len(study.queries), axis=0)
