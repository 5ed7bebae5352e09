"""Methods over sketched gradients and their second moment R: preconditioned influence and TrackStar.

Preconditioned influence is φ_qᵀ R⁻¹ φ_i with R from the rows. TrackStar (Chang et al. 2024, section 3) divides
gradients by the root of Adafactor's second moments, mixes R from both sides where the queries are many enough to show a
task, applies R^-½ to both, and compares directions. Either fails where the sketch is too small for the gradients: at
side 16 most of a matrix's gradient is noise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from attribute.curvature import Inversion, mixing_weight
from attribute.curvature._gram import mixing_note
from attribute.curvature._trackstar import NORMALIZER
from attribute.methods._estimator import GRADIENTS, SKETCH, Estimator, register_estimator
from attribute.methods._study import Study, cosines

_USES = GRADIENTS | SKETCH | {"normalizer", "moments", "damping"}


@register_estimator
class Preconditioned(Estimator):
    """φ_qᵀ R⁻¹ φ_i."""

    name: ClassVar[str] = "preconditioned-if"
    needs: ClassVar[str] = "a sketch"
    uses: ClassVar[frozenset[str]] = _USES
    cost: ClassVar[str] = "1 pass"
    source: ClassVar[str] = "Choe et al. 2024 (LoGra), eq. 5"

    def influence(self, study: Study) -> np.ndarray:
        """R⁻¹ on the query side."""
        rows, queries = study.sketches
        return study.gram(rows).apply(queries, Inversion("damped", study.damping)) @ rows.T


@register_estimator
class TrackStar(Estimator):
    """cos(R^-½ φ_q, R^-½ φ_i), R mixed."""

    name: ClassVar[str] = "trackstar"
    needs: ClassVar[str] = "a sketch; second moments (an optimiser's, or fitted)"
    uses: ClassVar[frozenset[str]] = _USES
    normalizer: ClassVar[str] = NORMALIZER
    cost: ClassVar[str] = "1 pass, 2 with moments to fit"
    source: ClassVar[str] = "Chang et al. 2024, section 3 and A.1.3"

    def influence(self, study: Study) -> np.ndarray:
        """R^-½ on both sides, then unit norm."""
        study = replace(study, normalizer=study.normalizer or self.normalizer)
        rows, queries = study.sketches
        of_rows, of_queries = study.gram(rows), study.gram(queries)
        weight = mixing_weight(of_rows, of_queries, study.components)
        study.progress.note(mixing_note(weight, "trace trackstar --target-downweight-components mixes all the same"))
        mixed = of_queries.mix(of_rows, weight)
        transform = mixed.transform(Inversion("damped", study.damping, -0.5))
        return cosines(transform(queries), transform(rows))
