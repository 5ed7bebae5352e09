"""Which latents a token keeps. A rule sees the encoder's products a block of rows at a time and keeps a few per row.

Add an activation by writing one small rule: `take` picks from a block, `finish` joins the blocks (or asks for another
sweep). Rules choose; they are not differentiated. What the chosen products become is the coder's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 24 << 20
"""Size of a block of products. Above 32 MiB glibc maps and unmaps the block on every use; below, it is reused."""
_MINUS_INFINITY = -128  # of bf16, as a whole number of 16 bits; one less is the least finite number
_VECTORISED = (torch.float32, torch.float64, torch.bfloat16)


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
        return Selection(*row_topk(block, self.k, in_order=self.in_order), None)

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
        values, within = row_topk(block.index_select(-1, self.latents), self.k)
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
        return Selection(*row_topk(block, self.width, in_order=True), None)

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


def row_topk(block: Tensor, k: int, *, in_order: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest of each row, exactly as torch.topk up to ties, and on a CPU several times as fast.

    The k largest of a row lie in the k groups with the largest maxima, so a maximum per group (one vectorised pass)
    leaves k · g candidates of M. Both choices are made by value: numpy's vectorised quickselect finds the k-th largest,
    and the places at or above it are the choice, unless a tie makes them too many (bf16 carries its place along).
    torch.topk visits (value, index) pairs one by one, at M = 2,048 three times as long as the encoder's product takes.
    """
    width = block.shape[-1]
    if block.device.type != "cpu" or block.dtype not in _VECTORISED or 2 * k > width:
        values, indices = block.topk(k, dim=-1, sorted=in_order)
        return values, indices
    values, indices = _by_groups(block, k)
    if in_order:
        values, order = values.sort(-1, descending=True)
        indices = indices.gather(-1, order)
    return values, indices


def _by_groups(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    width = block.shape[-1]
    groups = _group_size(width, k)
    if groups == 1:
        indices = largest(block, k)
        return block.gather(-1, indices), indices
    # Groups are strided, so that the maximum runs over whole vectors.
    best = largest(block.view(-1, groups, width // groups).amax(1), k)
    offsets = torch.arange(0, width, width // groups)
    candidates = (best[:, None, :] + offsets[:, None]).flatten(1)
    held = block.gather(-1, candidates)
    chosen = largest(held, k)
    return held.gather(-1, chosen), candidates.gather(-1, chosen)


def _group_size(width: int, k: int) -> int:
    """M / g + k · g numbers are partitioned, least at g = √(M / k)."""
    fitting = [g for g in (2, 4, 8, 16, 32) if width % g == 0 and width // g >= 2 * k]
    return min(fitting, key=lambda g: width / g + k * g, default=1)


def largest(block: Tensor, k: int) -> Tensor:
    """Positions of each row's k largest (N, k), in no order, on as many threads as torch may use; for CPUs."""
    choose = _positions
    if block.dtype == torch.bfloat16:
        if block.shape[-1] > 1 << 16:
            return largest(block.float(), k)
        # A number of 16 bits and its place in a word of 32: no ties, and the words that are largest tell their places.
        words = block.detach().contiguous().view(torch.int16).int()
        words.sub_((words == _MINUS_INFINITY).int())  # with a place it were not a number, and those rank first
        block = (
            words.bitwise_left_shift_(16)
            .bitwise_or_(torch.arange(block.shape[-1], dtype=torch.int32))
            .view(torch.float32)
        )
        choose = _places
    rows = block.detach().numpy()
    threads = min(torch.get_num_threads(), max(1, rows.size >> 17))
    if threads == 1:
        return torch.from_numpy(choose(rows, k))
    parts = _pool(threads).map(lambda part: choose(part, k), np.array_split(rows, threads))
    return torch.from_numpy(np.concatenate(list(parts)))


def _places(words: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    width = words.shape[-1]
    best = np.ascontiguousarray(np.partition(words, width - k, axis=-1)[:, width - k :])
    return (best.view(np.uint32) & 0xFFFF).astype(np.int64)


def _positions(rows: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    count, width = rows.shape
    kth = np.partition(rows, width - k, axis=-1)[:, width - k, None]
    found = np.flatnonzero(rows >= kth)
    begin = np.arange(0, count * width, width)[:, None]
    if found.size == count * k:
        positions = found.reshape(count, k) - begin
        # Positions rise within a row, so the outermost tell whether k lie in each; with NaN they need not.
        if not count or (positions[:, 0].min() >= 0 and positions[:, -1].max() < width):
            return positions
    return np.argpartition(rows, width - k, axis=-1)[:, width - k :]  # ties


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sparsify-topk")


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
