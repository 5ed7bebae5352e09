"""One module's gradients of a batch as the factors they are products of, multiplied only where that is cheaper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._factors import Factor, OneHot
from gradcore._product_costs import ROUTES, product_costs
from gradcore.sketches._protocol import BoundSketch, Sketch

FORMED_FLOATS = 1 << 22
"""Floats of gradients or of ghost products that exist at once."""


@dataclass(frozen=True)
class ModuleGradient:
    """Gradients ``G_n = Σ_s out_ns in_nsᵀ`` of one module for the examples of a batch, not multiplied out.

    Every product is exact: factors in half precision are multiplied in float32. Each method takes the cheaper of two
    routes. *Ghost*: inner products of factors, ``⟨Σ_s g_s x_sᵀ, Σ_t h_t y_tᵀ⟩ = Σ_st (g_s·h_t)(x_s·y_t)``, at
    s·t·(out + in) multiplications a pair (Goodfellow 2015; Li et al. 2022, section 4). *Formed*: the matrices
    themselves, at s·out·in an example and out·in a pair, in blocks of bounded memory.

    >>> import torch
    >>> gradient = ModuleGradient("layer", torch.ones(2, 3, 8), torch.ones(2, 3, 4))
    >>> gradient.dense().shape, gradient.sq_norm()
    (torch.Size([2, 8, 4]), tensor([288., 288.]))

    Attributes:
        name: the module.
        out: ``[n, s, out]``; one-hot for a table that is looked up; ``None`` for a vector layer.
        into: ``[n, s, in]``; ``None`` for a vector layer.
        vectors: of a vector layer, ``[n, s, out]`` for its weight and, where captured, its bias.
        first: place of the first example in its batch, where a collector hands a batch over in blocks.
    """

    name: str
    out: Factor | None = None
    into: Tensor | None = None
    vectors: tuple[Tensor, ...] = ()
    first: int = 0

    def __post_init__(self) -> None:
        if (self.out is None or self.into is None) == (not self.vectors):
            raise GradCoreError(f"{self.name}: a gradient is either a pair of factors or vectors")

    def __len__(self) -> int:
        """Examples."""
        return len(self.vectors[0]) if self.into is None else len(self.into)

    @property
    def positions(self) -> int:
        """Positions an example, padding included."""
        return (self.vectors[0] if self.into is None else self.into).shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one example's gradient."""
        if self.out is None or self.into is None:
            return self.vectors[0].shape[2], len(self.vectors)
        width = self.out.width if isinstance(self.out, OneHot) else self.out.shape[2]
        return width, self.into.shape[2]

    def __getitem__(self, examples: slice) -> ModuleGradient:
        """Those of some examples."""
        out = replace(self.out, ids=self.out.ids[examples]) if isinstance(self.out, OneHot) else self.out
        return replace(
            self,
            out=out[examples] if isinstance(out, Tensor) else out,
            into=None if self.into is None else self.into[examples],
            vectors=tuple(each[examples] for each in self.vectors),
        )

    def per_position(self) -> ModuleGradient:
        """Every position as an example of its own, ``n·s`` in order; those of an example sum to its gradient."""

        def alone(factor: Tensor) -> Tensor:
            return factor.flatten(0, 1)[:, None]

        out = self.out
        return replace(
            self,
            out=replace(out, ids=out.ids.reshape(-1, 1))
            if isinstance(out, OneHot)
            else out
            if out is None
            else alone(out),
            into=None if self.into is None else alone(self.into),
            vectors=tuple(map(alone, self.vectors)),
        )

    @classmethod
    def formed(cls, name: str, gradient: Tensor, first: int = 0) -> ModuleGradient:
        """A gradient that exists, ``[n, out, in]``: its rows are factors, their partners unit vectors."""
        n, out, _ = gradient.shape
        return cls(name, OneHot(torch.arange(out, device=gradient.device).expand(n, out), out), gradient, first=first)

    @classmethod
    def joined(cls, parts: Sequence[ModuleGradient]) -> ModuleGradient:
        """The parts of one batch as one: calls of a module that ran again side by side, blocks one after another."""
        if len(parts) == 1:
            return parts[0]
        blocks: dict[int, list[ModuleGradient]] = {}
        for each in parts:
            blocks.setdefault(each.first, []).append(each)
        calls = [_concatenated(_of_one_kind(blocks[first]), dim=1) for first in sorted(blocks)]
        return calls[0] if len(calls) == 1 else _concatenated(calls, dim=0)

    def dense(self) -> Tensor:
        """The gradients ``[n, out, in]``, at least float32."""
        if self.out is None or self.into is None:
            return torch.stack([_exact(each).sum(1) for each in self.vectors], dim=-1)
        if isinstance(self.out, OneHot):
            return self.out.transposed_product(_exact(self.into))
        return _exact(self.out).mT @ _exact(self.into)

    def blocks(self, floats: int = FORMED_FLOATS) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`dense` in blocks of examples of at most ``floats`` floats (one example at least)."""
        step = max(1, floats // (self.shape[0] * self.shape[1]))
        for start in range(0, len(self), step):
            examples = slice(start, min(start + step, len(self)))
            yield examples, self[examples].dense()

    def sq_norm(self) -> Tensor:
        """Squared Frobenius norms ``[n]``."""
        if self._ghost_is_cheaper(self.positions, pairs=1, formed=1):
            return torch.cat([_ghost(part, part, aligned=True) for part in self._split(self.positions**2)])
        return torch.cat([block.square().sum((1, 2)) for _, block in self.blocks()])

    def sketch(self, sketch: Sketch | BoundSketch) -> Tensor:
        """What a sketch keeps of each gradient, ``[n, floats]`` in float32; gradients are not formed for those that
        need not.

        >>> import torch
        >>> from gradcore import TensorSketch
        >>> ModuleGradient("layer", torch.ones(2, 3, 8), torch.ones(2, 3, 4)).sketch(TensorSketch(16)).shape
        torch.Size([2, 16])

        Args:
            sketch: bound for this call alone; or bound before, to this module's name and shape, for many calls.
        """
        if not isinstance(sketch, BoundSketch):
            out, into = self.shape
            device = (self.vectors[0] if self.into is None else self.into).device
            sketch = sketch.bind(self.name, out, into, device, self.into is None)
        if self.out is None or self.into is None:
            return sketch.vector(self.dense()).flatten(1).float()
        return sketch.combine(sketch.project_out(self.out), sketch.project_in(self.into)).flatten(1).float()

    def dot(self, other: ModuleGradient | Tensor, *, route: str = "") -> Tensor:
        """Inner products ``[n, m]`` with other gradients of this module, or with matrices ``[m, out, in]``.

        Args:
            other: what they are with.
            route: of matrices, ``"contracted"`` or ``"formed"`` instead of what :func:`product_costs` finds cheaper.

        Raises:
            GradCoreError: they are of another shape, or there is no such route.
        """
        if tuple(other.shape[-2:]) != self.shape:
            raise GradCoreError(
                f"{self.name}: gradients of {list(self.shape)} have no inner product with {list(other.shape[-2:])}"
            )
        if isinstance(other, Tensor):
            return self._dot_matrices(_exact(other), route)
        if self._ghost_is_cheaper(other.positions, pairs=len(other), formed=1 + len(other) / max(len(self), 1)):
            cost = len(other) * self.positions * other.positions
            return torch.cat([_ghost(part, other, aligned=False) for part in self._split(cost)])
        return torch.cat(
            [
                torch.cat([mine.flatten(1) @ theirs.flatten(1).T for _, theirs in other.blocks()], dim=1)
                for _, mine in self.blocks()
            ]
        )

    def dot_and_sq_norm(self, matrices: Tensor, *, route: str = "") -> tuple[Tensor, Tensor]:
        """:meth:`dot` with matrices ``[m, out, in]`` and :meth:`sq_norm`, with gradients formed once at most."""
        if isinstance(self.out, OneHot) or self._contracts(len(matrices), route, norms=True):
            return self.dot(matrices, route="contracted"), self.sq_norm()
        flat = _exact(matrices).flatten(1).T
        found = [(block.flatten(1) @ flat, block.square().sum((1, 2))) for _, block in self.blocks()]
        return torch.cat([dots for dots, _ in found]), torch.cat([squares for _, squares in found])

    def sum_over_examples(self) -> Tensor:
        """``Σ_n G_n [out, in]`` in one product, no example's own being formed."""
        if self.out is None or self.into is None:
            return torch.stack([_exact(each).sum((0, 1)) for each in self.vectors], dim=-1)
        flat = _exact(self.into).flatten(0, 1)
        if isinstance(self.out, OneHot):
            return replace(self.out, ids=self.out.ids.reshape(1, -1)).transposed_product(flat[None])[0]
        return _exact(self.out).flatten(0, 1).T @ flat

    def scaled(self, weights: Tensor) -> ModuleGradient:
        """Every example's gradient times its weight ``[n]``."""
        if self.into is None:
            return replace(self, vectors=tuple(_exact(each) * weights[:, None, None] for each in self.vectors))
        return replace(self, into=_exact(self.into) * weights[:, None, None])

    def _ghost_is_cheaper(self, positions: int, *, pairs: int, formed: float) -> bool:
        """The cost rule, in multiplications an example of this batch.

        Ghost: ``pairs · s · t · (out + in)``. Formed: ``formed`` matrices of ``s · out · in``, and ``pairs`` products
        of ``out · in``. A looked-up table is never formed where it is larger than its positions.
        """
        if self.into is None:
            return False
        out, into = self.shape
        ghost = pairs * self.positions * positions * (into + (1 if isinstance(self.out, OneHot) else out))
        summed = self.positions * into if isinstance(self.out, OneHot) else self.positions * out * into
        return ghost < formed * summed + pairs * out * into

    def _contracts(self, matrices: int, route: str, *, norms: bool = False) -> bool:
        """Whether factors meet matrices position by position, rather than as gradients that are formed."""
        if route not in ("", *ROUTES):
            raise GradCoreError(f"a product has the routes {' and '.join(ROUTES)}, not {route!r}")
        if self.into is None:
            return False
        costs = product_costs(*self.shape, self.positions, matrices, norms=norms)
        return (route or min(ROUTES, key=costs.__getitem__)) == "contracted"

    def _dot_matrices(self, matrices: Tensor, route: str) -> Tensor:
        if isinstance(self.out, OneHot) and self.into is not None:
            table, into = self.out, _exact(self.into)
            found = [(table.rows_of(matrix) * into).sum((1, 2)) for matrix in matrices]
            return torch.stack(found, dim=1) if found else into.new_zeros(len(self), 0)
        if self._contracts(len(matrices), route) and isinstance(self.out, Tensor) and self.into is not None:
            out, into = _exact(self.out), _exact(self.into)
            found = [torch.einsum("nsi,nsi->n", out @ matrix, into) for matrix in matrices]
            return torch.stack(found, dim=1) if found else into.new_zeros(len(self), 0)
        flat = matrices.flatten(1).T
        return torch.cat([block.flatten(1) @ flat for _, block in self.blocks()])

    def _split(self, cost: int) -> Iterator[ModuleGradient]:
        """Blocks of examples of which each costs so many floats."""
        step = max(1, FORMED_FLOATS // max(cost, 1))
        for start in range(0, len(self), step):
            yield self[start : start + step]


def _of_one_kind(parts: Sequence[ModuleGradient]) -> Sequence[ModuleGradient]:
    """A table that is looked up and multiplied with, too, has one-hot factors written out beside dense ones."""
    if len({isinstance(each.out, OneHot) for each in parts}) == 1:
        return parts
    return [replace(each, out=each.out.dense()) if isinstance(each.out, OneHot) else each for each in parts]


def _concatenated(parts: Sequence[ModuleGradient], dim: int) -> ModuleGradient:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    out: Factor | None = None
    if isinstance(first.out, OneHot):
        out = replace(first.out, ids=torch.cat([each.out.ids for each in parts if isinstance(each.out, OneHot)], dim))
    elif first.out is not None:
        out = torch.cat([each.out for each in parts if isinstance(each.out, Tensor)], dim)
    return replace(
        first,
        out=out,
        into=None if first.into is None else torch.cat([each.into for each in parts if each.into is not None], dim),
        vectors=tuple(torch.cat(each, dim) for each in zip(*(part.vectors for part in parts))),
    )


def _ghost(mine: ModuleGradient, theirs: ModuleGradient, *, aligned: bool) -> Tensor:
    """Ghost products of examples ``[n]`` with themselves, or ``[n, m]`` of all pairs."""
    assert mine.into is not None
    assert theirs.into is not None
    assert mine.out is not None
    assert theirs.out is not None
    return (_grams(mine.into, theirs.into, aligned) * _grams(mine.out, theirs.out, aligned)).sum((-2, -1))


def _grams(left: Factor, right: Factor, aligned: bool) -> Tensor:
    """Inner products of positions: ``[n, s, t]`` of the same examples, or ``[n, m, s, t]`` of all pairs."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.einsum("nsd,ntd->nst" if aligned else "nsd,mtd->nmst", _exact(left), _exact(right))
    if isinstance(left, OneHot) and isinstance(right, OneHot):
        mine, theirs = left.ids, right.ids
        mine, theirs = (
            (mine[..., None], theirs[:, None]) if aligned else (mine[:, None, :, None], theirs[None, :, None])
        )
        return ((mine == theirs) & (mine >= 0)).float()
    if isinstance(right, OneHot):
        return _grams(right, left, aligned).movedim(1, 0).mT if not aligned else _grams(right, left, aligned).mT
    assert isinstance(left, OneHot)
    assert isinstance(right, Tensor)
    # An inner product with a unit vector is a lookup.
    if aligned:
        table = _exact(right).mT  # [n, d, t]
        found = table.gather(1, left.ids.clamp(min=0)[..., None].expand(*left.ids.shape, table.shape[2]))
        return torch.where((left.ids >= 0)[..., None], found, 0)
    found = _exact(right)[:, :, left.ids.clamp(min=0)].permute(2, 0, 3, 1)  # [m, t, n, s] to [n, m, s, t]
    return torch.where((left.ids >= 0)[:, None, :, None], found, 0)


def _exact(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
