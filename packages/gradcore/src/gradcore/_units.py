"""What is done with the factors of one planned matrix on their way from hooks to rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, overload

import torch
from torch import Tensor

from gradcore._factors import Factor, OneHot
from gradcore._module_gradient import ModuleGradient
from gradcore._module_plan import ModulePlan
from gradcore._pass import Pass
from gradcore.layers import Layer
from gradcore.normalizers import BoundNormalizer
from gradcore.sketches import BoundSketch


class Receiver(Protocol):
    """Who gets the gradients: a collector."""

    per_position: bool

    @property
    def takes_factors(self) -> bool:
        """Factors instead of gradients."""
        ...

    def receive(self, current: Pass, name: str, gradient: Tensor) -> None:
        """A module's gradients ``[n, *shape]``."""

    def receive_factors(self, current: Pass, gradient: ModuleGradient) -> None:
        """A module's gradients as factors."""


@dataclass(frozen=True)
class Unit:
    """One planned matrix as one type of layer uses it: ``prepare`` in the forward pass, ``deliver`` in the backward."""

    receiver: Receiver
    planned: ModulePlan
    layer: Layer
    bound: BoundSketch
    normalizer: BoundNormalizer | None

    @property
    def _early(self) -> bool:
        """What a normaliser multiplies entry by entry, or by a table's row, must be known before it is projected."""
        return self.normalizer is None or (self.normalizer.factored and self.layer.forward_side == "in")

    def prepare(self, factor: Factor) -> Factor:
        """What is kept of the factor that the forward pass knows."""
        side = self.layer.forward_side
        return self._projected(part_of(factor, self.planned, side), side)

    def deliver(self, current: Pass, kept: Factor, arrived: Tensor) -> None:
        """Hand over the gradients that the kept factor and the one from the backward pass make."""
        self.deliver_blocks(current, [(kept, arrived)])

    def deliver_blocks(self, current: Pass, blocks: Iterable[tuple[Factor, Tensor]]) -> None:
        """The same of a batch in blocks of examples, one after another; one block where factors are taken."""
        rows: list[Tensor] = []
        for kept, arrived in blocks:
            found = self._joined(kept, arrived)
            if self.receiver.per_position:
                found = found.per_position()
            if self.receiver.takes_factors:
                for each in self._as_factors(found):
                    self.receiver.receive_factors(current, each)
            else:
                rows.append(self._as_rows(found))
        if rows:
            self.receiver.receive(current, self.planned.name, rows[0] if len(rows) == 1 else torch.cat(rows))

    def _projected(self, factor: Factor, side: str) -> Factor:
        if self.layer.elementwise or not self._early:
            return factor
        if self.normalizer is not None:
            assert isinstance(factor, Tensor)
            factor = self.normalizer.scale(factor, side)
        return self.bound.project_in(factor) if side == "in" else self.bound.project_out(factor)

    def _joined(self, kept: Factor, arrived: Tensor) -> ModuleGradient:
        side, name = self.layer.backward_side, self.planned.name
        arrived = part_of(arrived, self.planned, side)
        if self.layer.elementwise:
            assert isinstance(kept, Tensor)
            vectors = (kept * arrived, arrived) if self.planned.bias else (kept * arrived,)
            return ModuleGradient(
                name, vectors=vectors if self.normalizer is None else self.normalizer.vectors(vectors)
            )
        met = self._projected(arrived, side)
        out, into = (kept, met) if side == "in" else (met, kept)
        assert isinstance(into, Tensor)
        whole = ModuleGradient(name, out, into)
        if not self._early and isinstance(out, OneHot):
            assert self.normalizer is not None
            # Each position touches one row of the table, so that its factor can be multiplied instead.
            return ModuleGradient(name, out, self.normalizer.looked_up(out, into))
        return whole

    def _as_rows(self, found: ModuleGradient) -> Tensor:
        if found.vectors:
            return self.bound.vector(torch.stack([each.sum(1) for each in found.vectors], dim=-1))
        if self._early:
            assert found.out is not None
            assert found.into is not None
            return self.bound.combine(found.out, found.into)
        if isinstance(found.out, OneHot):
            assert found.into is not None
            return self.bound.combine(self.bound.project_out(found.out), self.bound.project_in(found.into))
        # Gradients multiplied entry by entry: formed a block at a time, and sketched as what they are.
        assert self.normalizer is not None
        return torch.cat([self.bound.matrix(self.normalizer.multiply(block)) for _, block in found.blocks()])

    def _as_factors(self, found: ModuleGradient) -> Iterator[ModuleGradient]:
        if found.vectors:
            yield self._sketched_vectors(found)
        elif self._early:
            yield found
        elif isinstance(found.out, OneHot):
            yield self._sketched(found)
        else:
            assert self.normalizer is not None
            for examples, block in found.blocks():
                # Scaled entry by entry it has no other factors than its rows.
                rows = ModuleGradient.formed(found.name, self.normalizer.multiply(block), first=examples.start)
                yield self._sketched(rows)

    def _sketched(self, found: ModuleGradient) -> ModuleGradient:
        assert found.out is not None
        assert found.into is not None
        into = self.bound.project_in(found.into)
        assert isinstance(into, Tensor)
        return replace(found, out=self.bound.project_out(found.out), into=into)

    def _sketched_vectors(self, found: ModuleGradient) -> ModuleGradient:
        """A vector layer's gradient comes summed and sketched, as one position."""
        rows = self._as_rows(found)
        columns = rows.unbind(-1) if rows.dim() == 3 else (rows,)
        return ModuleGradient(found.name, vectors=tuple(each[:, None] for each in columns))


@overload
def part_of(factor: Tensor, planned: ModulePlan, side: str) -> Tensor: ...
@overload
def part_of(factor: Factor, planned: ModulePlan, side: str) -> Factor: ...
def part_of(factor: Factor, planned: ModulePlan, side: str) -> Factor:
    """The features of the planned attention head, on the side where it is cut out."""
    head = planned.head
    if head is None or head.side != side or not isinstance(factor, Tensor):
        return factor
    return factor[..., head.start : head.stop]
