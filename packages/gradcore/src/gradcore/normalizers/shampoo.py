"""The diagonal of Shampoo: (Σ_i v_oi)^-¼ (Σ_o v_oi)^-¼, from the diagonals of E[G Gᵀ] and E[Gᵀ G].

Gupta, Koren & Singer 2018, algorithm 1, with both preconditioners cut to their diagonals.
"""

from __future__ import annotations

from torch import Tensor

from gradcore.normalizers._protocol import Scale, register_normalizer

EPSILON = 1e-30


@register_normalizer("shampoo")
def shampoo(moments: Tensor) -> Scale:
    """Fourth roots of either side."""
    return Scale(out=(moments.sum(1) + EPSILON) ** -0.25, into=(moments.sum(0) + EPSILON) ** -0.25)
