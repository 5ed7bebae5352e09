"""Curvature of the training loss: fitted once, kept as a versioned sidecar with its eigendecompositions.

``Gram`` is the second moment of sketched gradients (TrackStar, preconditioned influence), ``Kronecker`` the factored
Fisher of whole matrices (K-FAC, EK-FAC, TK-FAC, Shampoo). Either multiplies gradients by H⁻¹ or H^-½.
"""

from attribute.curvature._commands import fit_hessian, fit_preconditioners
from attribute.curvature._fit import METHODS, fit_kronecker
from attribute.curvature._gram import Gram, gram_of_store, mixing_weight
from attribute.curvature._inversion import KINDS, Inversion
from attribute.curvature._kronecker import Kronecker, KroneckerModule
from attribute.curvature._sidecar import load_curvature
from attribute.curvature._trackstar import trackstar

__all__ = [
    "Gram",
    "Inversion",
    "KINDS",
    "Kronecker",
    "KroneckerModule",
    "METHODS",
    "fit_hessian",
    "fit_kronecker",
    "fit_preconditioners",
    "gram_of_store",
    "load_curvature",
    "mixing_weight",
    "trackstar",
]
