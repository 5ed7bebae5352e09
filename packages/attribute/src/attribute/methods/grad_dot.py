"""Grad-dot: ⟨g_query, g_row⟩, the first-order change of the query's loss per unit step on the row.

A gradient step of size η on the row changes the query's loss by −η ⟨g_query, g_row⟩, so positive rows are proponents.
Pruthi et al. 2020 ("TracIn", eq. 1) with a single checkpoint and unit learning rate. Rows with long texts have large
gradients and come first; :mod:`attribute.methods.grad_cos` takes that away.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attribute.methods._registry import InnerProduct, register_method


@register_method
class GradDot(InnerProduct):
    """Dot product of gradients."""

    name: ClassVar[str] = "grad-dot"
    metric: ClassVar[Literal["dot", "cos"]] = "dot"
