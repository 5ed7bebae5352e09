"""Which latents a token keeps. A rule sees the encoder's products a block of rows at a time and keeps a few per row.

Add an activation by writing one small rule: `take` picks from a block, `finish` joins the blocks (or asks for another
sweep). Rules choose; they are not differentiated. What the chosen products become is the coder's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Selection(NamedTuple):
    """Chosen products of each row, padded to a common width.

    ``values`` and ``indices`` are (N, K); ``valid`` marks the entries that are not padding, None where none is.
    """

    values: Tensor
    indices: Tensor
    valid: Tensor | None


class Rule(Protocol):
    """Chooses latents from blocks of encoder products, each (rows, M)."""

    def take(self, block: Tensor) -> Selection:
        """The choice among one block's rows."""
        ...

    def finish(self, parts: Sequence[Selection]) -> Selection | None:
        """The choice for all rows; None asks for one more sweep over the blocks."""
        ...


@dataclass(frozen=True)
class TopK:
    """The k largest products of each row."""

    k: int
    in_order: bool = False

    def take(self, block: Tensor) -> Selection:
        """One partial sort per row."""
        values, indices = block.topk(self.k, dim=-1, sorted=self.in_order)
        return Selection(values, indices, None)

    def finish(self, parts: Sequence[Selection]) -> Selection:
        """Rows are independent."""
        return joined(parts)


@dataclass(frozen=True)
class GroupMax:
    """The largest product of each of k contiguous groups of latents."""

    k: int

    def take(self, block: Tensor) -> Selection:
        """A maximum per group: no sort at all."""
        values, within = block.unflatten(-1, (self.k, -1)).max(dim=-1)
        first = torch.arange(0, block.shape[-1], block.shape[-1] // self.k, device=block.device)
        return Selection(values, within + first, None)

    def finish(self, parts: Sequence[Selection]) -> Selection:
        """Rows are independent."""
        return joined(parts)


@dataclass(frozen=True)
class Among:
    """The k largest products of each row among a subset of the latents: AuxK's dead ones."""

    latents: Tensor
    k: int

    def take(self, block: Tensor) -> Selection:
        """Gather the subset's columns, then a partial sort."""
        values, within = block.index_select(-1, self.latents).topk(self.k, dim=-1, sorted=False)
        return Selection(values, self.latents[within], None)

    def finish(self, parts: Sequence[Selection]) -> Selection:
        """Rows are independent."""
        return joined(parts)


@dataclass(frozen=True)
class Above:
    """Every product above its latent's threshold, a scalar or an (M,) tensor."""

    threshold: Tensor

    def take(self, block: Tensor) -> Selection:
        """Compact the mask row by row."""
        mask = block > self.threshold
        rows, columns = mask.nonzero(as_tuple=True)
        counts = mask.sum(-1)
        width = int(counts.max()) if counts.numel() else 0
        position = torch.arange(rows.numel(), device=block.device) - (counts.cumsum(0) - counts)[rows]
        indices = columns.new_zeros(block.shape[0], width)
        indices[rows, position] = columns
        valid = torch.arange(width, device=block.device) < counts[:, None]
        values = block.gather(-1, indices).masked_fill(~valid, 0.0)
        return Selection(values, indices, valid)

    def finish(self, parts: Sequence[Selection]) -> Selection:
        """Rows are independent; the widest block sets the width."""
        return joined(parts)


class BatchTopK:
    """The k·N largest products of the whole batch, exactly, without holding (N, M) at once.

    Each row offers its ``width`` best. If a row's weakest offer still wins, that row may have more winners than it
    was allowed to offer, so the width doubles and the blocks are swept again: rare, and never wrong.
    """

    def __init__(self, k: int, latents: int) -> None:
        self.k, self.latents = k, latents
        self.width = min(latents, 8 * k)

    def take(self, block: Tensor) -> Selection:
        """The row's candidates."""
        values, indices = block.topk(self.width, dim=-1, sorted=True)
        return Selection(values, indices, None)

    def finish(self, parts: Sequence[Selection]) -> Selection | None:
        """Keep the k·N best positive candidates, or widen."""
        offered = joined(parts)
        rows = offered.values.shape[0]
        budget = self.k * rows
        if not rows:
            return offered
        flat = offered.values.flatten()
        threshold = flat.kthvalue(flat.numel() - budget + 1).values.clamp_min(0.0)
        valid = (offered.values >= threshold) & (offered.values > 0)
        if self.width < self.latents and bool(valid[:, -1].any()):
            self.width = min(self.latents, 2 * self.width)
            return None
        keep = int(valid.sum(-1).max())
        valid = valid[:, :keep]
        return Selection(offered.values[:, :keep].masked_fill(~valid, 0.0), offered.indices[:, :keep], valid)


def joined(parts: Sequence[Selection]) -> Selection:
    """Stack the blocks' selections, padding narrow ones; padding is never valid."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.indices.shape[1] for part in parts)
    if all(part.valid is None for part in parts):
        return Selection(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]), None)
    padded = [_padded(part, width) for part in parts]
    values, indices, valid = (torch.cat(column) for column in zip(*padded))
    return Selection(values, indices, valid)


def _padded(part: Selection, width: int) -> tuple[Tensor, Tensor, Tensor]:
    missing = (0, width - part.indices.shape[1])
    valid = part.valid if part.valid is not None else torch.ones_like(part.indices, dtype=torch.bool)
    pad = torch.nn.functional.pad
    return pad(part.values, missing), pad(part.indices, missing), pad(valid, missing)
