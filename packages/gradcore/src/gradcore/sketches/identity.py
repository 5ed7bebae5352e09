"""No sketch: the whole gradient, [out, in] floats a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch


@register_sketch
@dataclass(frozen=True)
class Identity(Sketch):
    """Keep gradients whole.

    >>> Identity().shape(8, 4)
    (8, 4)
    """

    kind: ClassVar[str] = "identity"

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """``(out, in)``."""
        return out_features, in_features

    def bind(self, name: str, out_features: int, in_features: int, device: torch.device) -> BoundSketch:
        """Nothing to make."""
        return _BoundIdentity()


class _BoundIdentity(BoundSketch):
    def keep(self, activation: Tensor) -> Tensor:
        return activation.detach()  # no copy: the collector watches for in-place changes

    def contract(self, kept: Tensor, output_gradient: Tensor) -> Tensor:
        return output_gradient.mT @ kept.to(output_gradient.dtype)  # [n, out, s] @ [n, s, in]
