"""Sparse Johnson–Lindenstrauss: every entry of the gradient goes, under random signs, to a few of the places.

The block construction of Kane & Nelson 2014 ("Sparser Johnson–Lindenstrauss transforms", §1.1): the places form
``nonzeros`` blocks, and each entry has one place and one sign in each. A norm's noise is about √(2/floats) as for dense
signs, at ``nonzeros`` additions an entry instead of ``floats``; the gradient is formed, which costs most.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._philox import stream_key, words
from gradcore.sketches._budgets import Budgeted, Budgets
from gradcore.sketches._protocol import BoundSketch, register_sketch
from gradcore.sketches._whole import BoundMatrix
from gradcore.sketches.identity import BoundWhole


@register_sketch
@dataclass(frozen=True)
class SparseJL(Budgeted):
    """``P vec(G)`` with ``nonzeros`` entries ±1/√nonzeros in each column of P.

    >>> SparseJL(floats=256).shape(4096, 1024)
    (256,)

    Args:
        floats: kept a module; a gradient that has no more is kept whole.
        nonzeros: places an entry goes to; they must divide ``floats``.
        seed: another seed is another sketch; places and signs are keyed by (module, seed).
        budgets: (module, floats) where it is not ``floats``: :func:`gradcore.share_floats`.
    """

    floats: int = 256
    nonzeros: int = 4
    seed: int = 0
    budgets: Budgets = ()
    kind: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        self._read_budgets()
        for floats in (self.floats, *(count for _, count in self.budgets)):
            if self.nonzeros < 1 or floats < 2 * self.nonzeros or floats % self.nonzeros:
                raise GradCoreError(
                    f"a sparse sketch has floats divisible by nonzeros and at least twice as many, not {floats} and "
                    f"{self.nonzeros}"
                )

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(min(floats, out · in),)``."""
        return (min(self.floats_of(name), out_features * in_features),)

    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """The sparse matrix; none for a gradient that is kept whole."""
        whole, floats = out_features * in_features, self.floats_of(name)
        if whole <= floats:
            return BoundWhole()
        places, signs = self.hashes(name, whole)
        rows = (places + torch.arange(self.nonzeros)[:, None] * (floats // self.nonzeros)).flatten()
        order = rows.argsort(stable=True)
        starts = torch.zeros(floats + 1, dtype=torch.int64)
        starts[1:] = torch.bincount(rows, minlength=floats).cumsum(0)
        values = signs.flatten()[order].to(torch.float32) / self.nonzeros**0.5
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            matrix = torch.sparse_csr_tensor(
                starts, order % whole, values, (floats, whole), check_invariants=True, device=device
            )
        return _BoundSparse(matrix)

    def hashes(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        """Of one module: the place within each block and the sign of each entry, both ``[nonzeros, width]``."""
        floats = self.floats_of(name)
        drawn = words(self.nonzeros, width, stream_key(name, "sparse", floats, self.nonzeros, self.seed))
        return (drawn >> 1) % (floats // self.nonzeros), (drawn & 1) * 2 - 1


class _BoundSparse(BoundMatrix):
    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def product(self, gradients: Tensor) -> Tensor:
        return (self._matrix @ gradients.T).T
