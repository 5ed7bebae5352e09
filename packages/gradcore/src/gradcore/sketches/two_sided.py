"""Two-sided (Kronecker) sketch: L G Rᵀ with random L and R, the field's ``--projection_dim``.

``E⟨L G Rᵀ, L H Rᵀ⟩ = ⟨G, H⟩`` for any G, H and any shape, since entries have variance 1/side (a scale that depended on
the layer's shape would silently re-weight modules). A rank-1 gradient keeps its squared norm up to relative noise
√((1+2/side)²−1) with normal entries. The gradient of a vector layer has no second side: it is kept whole where it is
not larger than the sketch, and multiplied with one matrix where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._factors import Factor, OneHot
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
    bilinear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.side < 1:
            raise GradCoreError(f"the side of a two-sided sketch must be at least 1, not {self.side}")
        if self.entries not in _ENTRIES:
            raise GradCoreError(f"sketch entries must be one of {', '.join(_ENTRIES)}, not {self.entries!r}")

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(side, side)``; a vector layer has ``(min(side², d),)``."""
        if elementwise:
            return (min(self.side**2, out_features * in_features),)
        return self.side, self.side

    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """L ``[side, out]`` and R ``[side, in]`` of one module."""
        if elementwise:
            floats = out_features * in_features
            whole = floats <= self.side**2
            matrix = None if whole else self.matrix(name, "vector", floats, rows=self.side**2).to(device)
            return _BoundVector(matrix)
        return _BoundTwoSided(
            left=self.matrix(name, "left", out_features).to(device),
            right=self.matrix(name, "right", in_features).to(device),
        )

    def matrix(self, name: str, side: str, width: int, *, rows: int = 0) -> Tensor:
        """The sketch matrix ``[side, width]`` in float32 of one module and side (``"left"`` or ``"right"``)."""
        rows = rows or self.side
        return _ENTRIES[self.entries](rows, width, stream_key(name, side, self.seed)) / rows**0.5


class _BoundTwoSided(BoundSketch):
    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left_t = left.T.contiguous()  # [out, side]
        self._right_t = right.T.contiguous()  # [in, side]

    def project_out(self, factor: Factor) -> Factor:
        return _project(factor, self._left_t)  # [n, s, side]

    def project_in(self, factor: Factor) -> Factor:
        return _project(factor, self._right_t)  # [n, s, side]

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        assert isinstance(out_factor, Tensor)
        assert isinstance(in_factor, Tensor)
        # The sum over positions in float32: half precision would lose the small terms.
        return out_factor.float().mT @ in_factor.float()

    def vector(self, gradient: Tensor) -> Tensor:
        raise GradCoreError("a matrix layer's gradient comes as factors")


class _BoundVector(BoundSketch):
    def __init__(self, matrix: Tensor | None) -> None:
        self._matrix = matrix

    def project_out(self, factor: Factor) -> Factor:
        return factor

    def project_in(self, factor: Factor) -> Factor:
        return factor

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        raise GradCoreError("a vector layer's gradient comes whole")

    def vector(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1).float()
        return flat if self._matrix is None else flat @ self._matrix.T


def _project(factor: Factor, matrix_t: Tensor) -> Tensor:
    if isinstance(factor, OneHot):
        return factor.rows_of(matrix_t)
    return factor @ matrix_t.to(factor.dtype)
