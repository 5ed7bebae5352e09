"""No sketch: the whole gradient, [out, in] floats a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcore._factors import Factor, OneHot
from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch


@register_sketch
@dataclass(frozen=True)
class Identity(Sketch):
    """Keep gradients whole.

    >>> Identity().shape(8, 4)
    (8, 4)
    """

    kind: ClassVar[str] = "identity"
    bilinear: ClassVar[bool] = True

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(out, in)``."""
        return out_features, in_features

    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """Nothing to make."""
        return _BoundIdentity()


class _BoundIdentity(BoundSketch):
    def project_out(self, factor: Factor) -> Factor:
        return factor

    def project_in(self, factor: Factor) -> Factor:
        return factor

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        assert isinstance(in_factor, Tensor)
        if isinstance(out_factor, OneHot):
            return out_factor.transposed_product(in_factor)
        return out_factor.mT @ in_factor.to(out_factor.dtype)  # [n, out, s] @ [n, s, in]

    def vector(self, gradient: Tensor) -> Tensor:
        return gradient

    def matrix(self, gradient: Tensor) -> Tensor:
        return gradient


class BoundWhole(_BoundIdentity):
    """All of a gradient that is no larger than a sketch of it, flat."""

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        """``[n, out · in]``."""
        return super().combine(out_factor, in_factor).flatten(1).float()

    def vector(self, gradient: Tensor) -> Tensor:
        """``[n, out · in]``."""
        return gradient.flatten(1).float()

    def matrix(self, gradient: Tensor) -> Tensor:
        """``[n, out · in]``."""
        return self.vector(gradient)
