"""Adam: G / (√v + ε), with a scale of its own for every entry, so that gradients have to be formed to be scaled.

Kingma & Ba 2015, algorithm 1; TrackStar's V (Chang et al. 2024, section 3) is of this kind.
"""

from __future__ import annotations

from torch import Tensor

from gradcore.normalizers._protocol import Scale, register_normalizer

EPSILON = 1e-8


@register_normalizer("adam")
def adam(moments: Tensor) -> Scale:
    """The reciprocal is taken once, not for each batch."""
    return Scale(dense=1 / (moments.sqrt() + EPSILON))
