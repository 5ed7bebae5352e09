"""Sketches that are one matrix times the whole gradient: it is formed, a few examples at a time."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from gradcore._factors import Factor, OneHot
from gradcore.sketches._protocol import BoundSketch

FORMED_FLOATS = 1 << 24
"""Floats of whole gradients that are formed at once."""


class BoundMatrix(BoundSketch):
    """``P vec(G)`` for a matrix P that has no structure to exploit."""

    @abstractmethod
    def product(self, gradients: Tensor) -> Tensor:
        """``[n, out · in]`` in float32 to ``[n, floats]``."""

    def project_out(self, factor: Factor) -> Factor:
        """Nothing is gained before the sum over positions."""
        return factor

    def project_in(self, factor: Factor) -> Factor:
        """Nothing is gained before the sum over positions."""
        return factor

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        """Form some examples' gradients, multiply, forget them."""
        assert isinstance(in_factor, Tensor)
        right = in_factor.float()
        width = out_factor.width if isinstance(out_factor, OneHot) else out_factor.shape[-1]
        step = max(1, FORMED_FLOATS // (width * right.shape[-1]))
        parts = [
            self.product(_formed(out_factor, right, slice(at, at + step)).flatten(1))
            for at in range(0, len(right), step)
        ]
        return torch.cat(parts)

    def vector(self, gradient: Tensor) -> Tensor:
        """A vector layer's gradient comes formed."""
        return self.product(gradient.flatten(1).float())


def _formed(left: Factor, right: Tensor, some: slice) -> Tensor:
    if isinstance(left, OneHot):
        return OneHot(left.ids[some], left.width).transposed_product(right[some])
    return left[some].float().mT @ right[some]
