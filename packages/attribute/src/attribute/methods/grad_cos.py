"""Grad-cos: grad-dot between unit gradients, so that neither length nor surprise of a row counts.

Barshan et al. 2020 ("RelatIF") argue for normalising by the row's own influence; Chang et al. 2024 ("TrackStar", table
1) find unit norm the largest single gain in retrieval. Over several modules the norm is that of all of them together.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attribute.methods._registry import InnerProduct, register_method


@register_method
class GradCos(InnerProduct):
    """Cosine of gradients."""

    name: ClassVar[str] = "grad-cos"
    metric: ClassVar[Literal["dot", "cos"]] = "cos"
