"""Two-sided (Kronecker) sketch: L G Rᵀ with random L and R, the field's ``--projection_dim``.

``E⟨L G Rᵀ, L H Rᵀ⟩ = ⟨G, H⟩`` for any G, H and any shape, since entries have variance 1/side (a scale that depended on
the layer's shape would silently re-weight modules). A rank-1 gradient keeps its squared norm up to relative noise
√((1+2/side)²−1) with normal entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._philox import normal, rademacher, stream_key
from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch

_ENTRIES = {"rademacher": rademacher, "normal": normal}


@register_sketch
@dataclass(frozen=True)
class TwoSided(Sketch):
    """``vec(L G Rᵀ)``: ``side²`` floats a module at ``2·side·(in+out)`` flops a token, never forming G.

    >>> TwoSided(side=16).shape(4096, 1024)
    (16, 16)

    Args:
        side: rows of L and of R.
        entries: ``"rademacher"`` (±1/√side) or ``"normal"`` (variance 1/side).
        seed: another seed is another sketch; matrices are keyed by (module, side, seed).
    """

    side: int = 16
    entries: str = "rademacher"
    seed: int = 0
    kind: ClassVar[str] = "two_sided"

    def __post_init__(self) -> None:
        if self.side < 1:
            raise GradCoreError(f"the side of a two-sided sketch must be at least 1, not {self.side}")
        if self.entries not in _ENTRIES:
            raise GradCoreError(f"sketch entries must be one of {', '.join(_ENTRIES)}, not {self.entries!r}")

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """``(side, side)``."""
        return self.side, self.side

    def bind(self, name: str, out_features: int, in_features: int, device: torch.device) -> BoundSketch:
        """L ``[side, out]`` and R ``[side, in]`` of one module."""
        return _BoundTwoSided(
            left=self.matrix(name, "left", out_features).to(device),
            right=self.matrix(name, "right", in_features).to(device),
        )

    def matrix(self, name: str, side: str, width: int) -> Tensor:
        """The sketch matrix ``[side, width]`` in float32 of one module and side (``"left"`` or ``"right"``)."""
        return _ENTRIES[self.entries](self.side, width, stream_key(name, side, self.seed)) / self.side**0.5


class _BoundTwoSided(BoundSketch):
    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left_t = left.T.contiguous()  # [out, side]
        self._right_t = right.T.contiguous()  # [in, side]

    def keep(self, activation: Tensor) -> Tensor:
        return activation.detach() @ self._right_t.to(activation.dtype)  # [n, s, side]

    def contract(self, kept: Tensor, output_gradient: Tensor) -> Tensor:
        projected = output_gradient @ self._left_t.to(output_gradient.dtype)  # [n, s, side]
        # The sum over positions in float32: half precision would lose the small terms.
        return projected.float().mT @ kept.float()
