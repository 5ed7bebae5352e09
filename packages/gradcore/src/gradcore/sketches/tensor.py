"""Tensor sketch: each factor is count-sketched, and the sketches are convolved (Pham & Pagh 2013, algorithm 1).

    sketch(Σ_s g_s x_sᵀ) = F⁻¹ Σ_s F(C₁ g_s) ⊙ F(C₂ x_s)

is a count sketch of the whole gradient whose hash is the sum of two: unbiased, one float per place instead of a square,
and the gradient is never formed. Where factors are narrow and positions many, Σ_s C₁g_s (C₂x_s)ᵀ, at most as large as
the square of the floats, is cheaper than a transform a position: its skewed columns are summed instead.

For a rank-1 gradient ‖sketch‖² has relative noise about √(6/floats), 0.155 at 256; the two-sided sketch has
√((1 + 2/16)² − 1) = 0.515 at as many floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._factors import Factor
from gradcore.sketches._budgets import Budgeted, Budgets
from gradcore.sketches._counts import CountSketch
from gradcore.sketches._protocol import BoundSketch, register_sketch
from gradcore.sketches.identity import BoundWhole

BLOCK_FLOATS = 1 << 18
"""Spread factors of a block of tokens: small enough to stay in a core's cache."""


@register_sketch
@dataclass(frozen=True)
class TensorSketch(Budgeted):
    """``floats`` a module whatever its shape, at O((in + out) + floats · log floats) a token; needs no data.

    >>> TensorSketch(floats=256).shape(4096, 1024)
    (256,)

    Args:
        floats: places kept a module; a gradient that has no more is kept whole.
        seed: another seed is another sketch; hashes are keyed by (module, floats, seed).
        budgets: (module, floats) where it is not ``floats``: :func:`gradcore.share_floats`.
    """

    floats: int = 256
    seed: int = 0
    budgets: Budgets = ()
    kind: ClassVar[str] = "tensor"

    def __post_init__(self) -> None:
        if self.floats < 2:
            raise GradCoreError(f"a tensor sketch keeps at least 2 floats a module, not {self.floats}")
        self._read_budgets()

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(min(floats, out · in),)``."""
        return (min(self.floats_of(name), out_features * in_features),)

    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """Two hashes; one for a vector layer; none for a gradient that is kept whole."""
        floats = self.floats_of(name)
        if out_features * in_features <= floats:
            return BoundWhole()
        return bound_tensor_sketch((name,), out_features, in_features, floats, self.seed, device, elementwise)


def bound_tensor_sketch(
    identity: tuple[str, ...],
    out_features: int,
    in_features: int,
    floats: int,
    seed: int,
    device: torch.device,
    elementwise: bool,
) -> BoundSketch:
    """The sketch of one module, also of one that has fewer entries than there are places."""
    if elementwise:
        key = (*identity, floats, seed)
        return _BoundVector(CountSketch(key, out_features * in_features, floats, device, scattered=True))
    sides = {"left": out_features, "right": in_features}
    narrow = min(sides, key=lambda side: sides[side])
    left, right = (
        CountSketch((*identity, side, floats, seed), width, floats, device, scattered=side == narrow)
        for side, width in sides.items()
    )
    return _BoundTensor(left, right)


class _BoundTensor(BoundSketch):
    """Two count sketches and their convolution."""

    def __init__(self, left: CountSketch, right: CountSketch) -> None:
        self._left, self._right = left, right

    def project_out(self, factor: Factor) -> Factor:
        return self._left.folded(factor)

    def project_in(self, factor: Factor) -> Factor:
        return self._right.folded(factor)

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        sides = (self._left, out_factor), (self._right, in_factor)
        wide, narrow = sides if self._left.stride == 1 else reversed(sides)
        n, s = _positions(out_factor)
        if isinstance(wide[1], Tensor) and isinstance(narrow[1], Tensor):
            rows, columns = narrow[1].shape[-1], wide[1].shape[-1]
            if _product_is_cheaper(s, rows, columns, self._left.width):
                return self._of_products(wide[1], narrow[1], narrow[0].stride)
        return self._of_spectra(wide, narrow, n, s)

    def _of_products(self, wide: Tensor, narrow: Tensor, stride: int) -> Tensor:
        """Place k is the sum of the entries (i, j) of Σ_s narrow_s wide_sᵀ with stride · i + j ≡ k.

        Row i of a matrix whose rows are ``width + stride`` long, read in rows of ``width``, stands stride · i further
        to the right: the sums are those of columns.
        """
        width = self._left.width
        n, rows, columns = len(wide), narrow.shape[-1], wide.shape[-1]
        lines = -(-rows * (width + stride) // width)
        out = wide.new_empty(n, width, dtype=torch.float32)
        step = max(1, BLOCK_FLOATS // (lines * width))
        held = out.new_zeros(min(step, n), lines * width)
        for first in range(0, n, step):
            some = slice(first, first + step)
            product = narrow[some].float().mT @ wide[some].float()
            held.as_strided((len(product), rows, columns), (lines * width, width + stride, 1)).copy_(product)
            torch.sum(held[: len(product)].unflatten(1, (lines, width)), 1, out=out[some])
        return out

    def _of_spectra(
        self, wide: tuple[CountSketch, Factor], narrow: tuple[CountSketch, Factor], n: int, s: int
    ) -> Tensor:
        width = self._left.width
        step = max(1, BLOCK_FLOATS // width)
        rows = max(1, step // max(s, 1))
        parts: list[Tensor] = []
        for first in range(0, n, rows):
            some = slice(first, first + rows)
            total = None
            for at in range(0, s, step):
                place = some, slice(at, at + step)
                product = wide[0].spectrum(_cut(wide[1], place))
                narrow[0].multiply(product, _cut(narrow[1], place))
                # As floats: summing complex numbers is several times slower on a CPU.
                block = torch.view_as_real(product).sum(1)
                total = block if total is None else total.add_(block)
            assert total is not None
            parts.append(total)
        return torch.fft.irfft(torch.view_as_complex(torch.cat(parts)), n=width)

    def vector(self, gradient: Tensor) -> Tensor:
        raise GradCoreError("a matrix layer's gradient comes as factors")


class _BoundVector(BoundSketch):
    """A count sketch of a vector layer's gradient."""

    def __init__(self, sketch: CountSketch) -> None:
        self._sketch = sketch

    def project_out(self, factor: Factor) -> Factor:
        return factor

    def project_in(self, factor: Factor) -> Factor:
        return factor

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        raise GradCoreError("a vector layer's gradient comes whole")

    def vector(self, gradient: Tensor) -> Tensor:
        spread = self._sketch.spread(self._sketch.folded(gradient.flatten(1).float()))
        return torch.nn.functional.pad(spread, (0, self._sketch.width - spread.shape[1]))


def _product_is_cheaper(positions: int, rows: int, columns: int, width: int) -> bool:
    """Measured on a core: a multiplication takes .035 ns, an entry laid out and summed 1.8, a position's transforms .5
    times m log₂ m."""
    product = 0.035 * positions * rows * columns + 1.8 * rows * width
    return product < 0.5 * positions * width * math.log2(width)


def _positions(factor: Factor) -> tuple[int, int]:
    shape = factor.shape if isinstance(factor, Tensor) else factor.ids.shape
    return shape[0], shape[1]


def _cut(factor: Factor, place: tuple[slice, slice]) -> Factor:
    if isinstance(factor, Tensor):
        return factor[place]
    return type(factor)(factor.ids[place], factor.width)
