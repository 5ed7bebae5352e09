"""A normaliser at one module: scales of either side, or of every entry."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from gradcore._factors import OneHot


class BoundNormalizer:
    """What the collector asks of it."""

    factored: ClassVar[bool]

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def scale(self, factor: Tensor, side: str) -> Tensor:
        """A factor ``[n, s, d]`` of one side, scaled: enough where every entry's scale is a product of two."""
        raise NotImplementedError

    def multiply(self, gradient: Tensor) -> Tensor:
        """Gradients ``[n, out, in]``, scaled."""
        raise NotImplementedError

    def vectors(self, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A vector layer's products ``[n, s, d]`` for weight and bias, scaled."""
        raise NotImplementedError

    def looked_up(self, out: OneHot, into: Tensor) -> Tensor:
        """The factor ``into [n, s, in]`` of a looked-up table, scaled by the row that each position touches."""
        raise NotImplementedError


class Dense(BoundNormalizer):
    """A scale for every entry ``[out, in]``."""

    factored: ClassVar[bool] = False

    def __init__(self, kind: str, scale: Tensor) -> None:
        super().__init__(kind)
        self._scale = scale

    def multiply(self, gradient: Tensor) -> Tensor:
        """In place: a block of gradients is the caller's own."""
        return gradient.mul_(self._scale)

    def vectors(self, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Column by column."""
        return tuple(each * self._scale[:, column].to(each.dtype) for column, each in enumerate(vectors))

    def looked_up(self, out: OneHot, into: Tensor) -> Tensor:
        """A lookup in the scales."""
        return into * out.rows_of(self._scale).to(into.dtype)


class Factored(BoundNormalizer):
    """``out_o · into_i``: either factor is scaled on its own, and no gradient is formed."""

    factored: ClassVar[bool] = True

    def __init__(self, kind: str, out: Tensor, into: Tensor) -> None:
        super().__init__(kind)
        self._sides = {"out": out, "in": into}

    def scale(self, factor: Tensor, side: str) -> Tensor:
        """Entry by entry along the last axis."""
        return factor * self._sides[side].to(factor.dtype)

    def vectors(self, vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Column by column."""
        out, into = self._sides["out"], self._sides["in"]
        return tuple(each * (out * into[column]).to(each.dtype) for column, each in enumerate(vectors))

    def looked_up(self, out: OneHot, into: Tensor) -> Tensor:
        """A lookup in the scales of the table's rows, and those of its columns."""
        rows = out.rows_of(self._sides["out"][:, None]).to(into.dtype)
        return into * rows * self._sides["in"].to(into.dtype)
