"""Influence functions under a Kronecker-factored Fisher: τ = g_qᵀ H⁻¹ g_i with H from K-FAC, EK-FAC, TK-FAC or Shampoo.

Grosse et al. 2023 ("Studying large language model generalization with influence functions", eqs. 6 and 20). H⁻¹ is
applied to the queries once; the rows then pass by. Damping is relative to each module's mean eigenvalue. Fails where
the Fisher of the trained model says little about the path that training took.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from attribute.curvature import Inversion
from attribute.methods._estimator import FISHER, GRADIENTS, Estimator, register_estimator
from attribute.methods._study import Study


class _Factored(Estimator):
    needs: ClassVar[str] = "factors over the rows (fitted)"
    uses: ClassVar[frozenset[str]] = GRADIENTS | FISHER | {"damping"}
    curvature: ClassVar[str]

    def influence(self, study: Study) -> np.ndarray:
        """⟨H⁻¹ g_q, g_i⟩."""
        curvature = study.curvature(self.curvature)
        return study.products(curvature.apply(study.query_gradients, Inversion("damped", study.damping)))


@register_estimator
class Kfac(_Factored):
    """K-FAC."""

    name: ClassVar[str] = "k-fac"
    curvature: ClassVar[str] = "kfac"
    cost: ClassVar[str] = "2 passes"
    source: ClassVar[str] = "Martens & Grosse 2015"


@register_estimator
class Ekfac(_Factored):
    """Eigenvalue-corrected K-FAC."""

    name: ClassVar[str] = "ek-fac"
    curvature: ClassVar[str] = "ekfac"
    cost: ClassVar[str] = "3 passes"
    source: ClassVar[str] = "George et al. 2018; Grosse et al. 2023, section 2"


@register_estimator
class Tkfac(_Factored):
    """Trace-restricted K-FAC."""

    name: ClassVar[str] = "tk-fac"
    curvature: ClassVar[str] = "tkfac"
    cost: ClassVar[str] = "2 passes"
    source: ClassVar[str] = "Gao et al. 2021, theorem 3.1"


@register_estimator
class EvShampoo(_Factored):
    """Eigenvalue-corrected Shampoo."""

    name: ClassVar[str] = "ev-shampoo"
    curvature: ClassVar[str] = "ev-shampoo"
    cost: ClassVar[str] = "3 passes"
    source: ClassVar[str] = "Morwani et al. 2024; George et al. 2018"
