"""Adafactor: v_oi ≈ r_o c_i / mean(r), so that a scale of either side is enough and no gradient is formed.

Shazeer & Stern 2018, section 3: with r and c the means over rows and columns this is the rank-1 matrix nearest to v in
I-divergence. Vector layers, which are small, keep every entry.
"""

from __future__ import annotations

from torch import Tensor

from gradcore.normalizers._protocol import Scale, register_normalizer

EPSILON = 1e-30


@register_normalizer("adafactor")
def adafactor(moments: Tensor) -> Scale:
    """``√mean(r) · r^-½`` on the out side, ``c^-½`` on the in side."""
    rows, columns = moments.mean(1) + EPSILON, moments.mean(0) + EPSILON
    return Scale(out=(rows.mean() / rows).sqrt(), into=columns.rsqrt())
