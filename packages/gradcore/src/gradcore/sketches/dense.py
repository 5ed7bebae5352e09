"""Dense sketch: random signs times the whole gradient, the textbook Johnson–Lindenstrauss projection (TRAK's, LESS's).

The best oblivious sketch a float can buy – the squared norm of any gradient has relative noise √(2/floats) – and by far
the dearest: ``floats · out · in`` flops an example and as many bytes of signs. A yardstick for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._philox import rademacher, stream_key
from gradcore.sketches._budgets import Budgeted, Budgets
from gradcore.sketches._protocol import BoundSketch, register_sketch
from gradcore.sketches._whole import BoundMatrix
from gradcore.sketches.identity import BoundWhole

LARGEST_BYTES = 2 << 30
"""Signs of one module that will be kept in memory."""
_SIGNS_AT_ONCE = 1 << 22


@register_sketch
@dataclass(frozen=True)
class Dense(Budgeted):
    """``P vec(G)`` with P of independent signs over √floats, drawn once a run and kept as bytes.

    >>> Dense(floats=256).shape(64, 48)
    (256,)

    Args:
        floats: kept a module; a gradient that has no more is kept whole.
        seed: another seed is another sketch; matrices are keyed by (module, seed), and the rows of a smaller one are
            the first rows of a larger one.
        budgets: (module, floats) where it is not ``floats``: :func:`gradcore.share_floats`.

    Raises:
        GradCoreError: (when bound) the signs of a module would take more than 2 GiB.
    """

    floats: int = 256
    seed: int = 0
    budgets: Budgets = ()
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if self.floats < 1:
            raise GradCoreError(f"a dense sketch keeps at least 1 float a module, not {self.floats}")
        self._read_budgets()

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(min(floats, out · in),)``."""
        return (min(self.floats_of(name), out_features * in_features),)

    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """The signs ``[floats, out · in]`` as bytes; none for a gradient that is kept whole."""
        whole, floats = out_features * in_features, self.floats_of(name)
        if whole <= floats:
            return BoundWhole()
        if floats * whole > LARGEST_BYTES:
            raise GradCoreError(
                f"a dense sketch of {name} [{out_features}, {in_features}] to {floats} floats needs "
                f"{floats * whole / 2**30:.1f} GiB of signs: take a tensor sketch, which needs none"
            )
        return _BoundDense(self.signs(name, whole).to(device))

    def signs(self, name: str, width: int) -> Tensor:
        """The signs ``[floats, width]`` of one module, int8, unscaled."""
        key = stream_key(name, "dense", self.seed)
        floats = self.floats_of(name)
        found = torch.empty(floats, width, dtype=torch.int8)
        rows = max(1, _SIGNS_AT_ONCE // width)
        for first in range(0, floats, rows):
            count = min(rows, floats - first)
            found[first : first + count] = rademacher(count, width, key, first=first)
        return found


class _BoundDense(BoundMatrix):
    def __init__(self, signs: Tensor) -> None:
        self._signs = signs

    def product(self, gradients: Tensor) -> Tensor:
        total = gradients.new_zeros(len(gradients), len(self._signs))
        step = max(1, _SIGNS_AT_ONCE // len(self._signs))
        for at in range(0, gradients.shape[1], step):
            total.addmm_(gradients[:, at : at + step], self._signs[:, at : at + step].to(gradients.dtype).T)
        return total.mul_(len(self._signs) ** -0.5)
