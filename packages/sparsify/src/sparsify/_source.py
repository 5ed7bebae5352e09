"""Where a run's activations come from. Batch i is a function of i alone: to resume, a number is enough."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol
from zlib import crc32

import torch
from torch import Tensor, nn

from gradcore import model_fingerprint
from sparsify import _hooks
from sparsify._errors import DataError, SparsifyWarning, check_whole
from sparsify.data import StreamedRows, token_rows


class Pair(NamedTuple):
    """Inputs (N, D) and targets (N, Do) of one hookpoint; the same tensor for autoencoders."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Pair:
        """The pair on a device."""
        x = self.x.to(device)
        return Pair(x, x if self.y is self.x else self.y.to(device))


class Source(Protocol):
    """Batches of activations at several hookpoints."""

    widths: dict[str, tuple[int, int]]
    """Input and target width of each hookpoint."""

    def __len__(self) -> int:
        """Number of batches."""
        ...

    def batch(self, index: int) -> dict[str, Pair]:
        """Batch ``index`` of this process."""
        ...

    def fingerprint(self) -> str:
        """What the data is: a resumed run must see the same."""
        ...


class OnTheFly:
    """Activations computed as they are needed, by a model that stops after the deepest hookpoint.

    Args:
        model: any module called with (rows, tokens) ids, or with rows of whatever floating shape.
        dataset: whatever `sparsify.data.token_rows` takes.
        hookpoints: module names relative to the base model.
        transcode: pair modules' inputs with their outputs, instead of outputs with themselves: all, none, or some.
        batch_size: rows per batch.
        exclude: token ids whose positions are left out.
        max_norm_ratio: leave out tokens whose input norm exceeds this multiple of the batch's median; 0 keeps all.
        buffer_batches: how many batches are mixed token by token before they are served.
        seed: of the mixing.
        shard: (process, processes): batch i of process r is the (i · processes + r)-th of the data.
        keep_last: also serve the rows that fill no whole batch, as a last short one.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        hookpoints: Sequence[str],
        *,
        transcode: bool | Collection[str],
        batch_size: int,
        exclude: Sequence[int] = (),
        max_norm_ratio: float = 0.0,
        buffer_batches: int = 1,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        keep_last: bool = False,
    ) -> None:
        check_whole("batch_size", batch_size, 1)
        self.model, self.dataset, self.hookpoints = model, dataset, list(hookpoints)
        self.transcode, self.batch_size = transcode, batch_size
        self.max_norm_ratio, self.buffer_batches, self.seed = max_norm_ratio, buffer_batches, seed
        (self.rank, self.world), self.keep_last = shard, keep_last
        self.device = _hooks.device_of(model)
        self.exclude = torch.tensor(list(exclude), dtype=torch.long, device=self.device)
        self._block: tuple[int, dict[str, list[Pair]]] | None = None
        if len(self) < 1:
            raise DataError(
                f"the dataset has {len(dataset)} rows, fewer than one batch of {batch_size} for each of {self.world} "
                "processes: lower batch_size or give more data"
            )
        self.widths = self._measure()

    def __len__(self) -> int:
        rows, share = len(self.dataset), self.batch_size * self.world
        return -(-rows // share) if self.keep_last else rows // share

    def _measure(self) -> dict[str, tuple[int, int]]:
        row = self._checked(token_rows(self.dataset, 0, 1)).to(self.device)
        with torch.no_grad(), _hooks.frozen(self.model):
            few = row if row.is_floating_point() else row[:, :8]
            sites = _hooks.run(self.model, few, self.hookpoints, inputs=self.transcode)
        return {n: ((s.output if s.input is None else s.input).shape[-1], s.output.shape[-1]) for n, s in sites.items()}

    def reaches(self, index: int) -> bool:
        """Whether there is a batch ``index``, with what it is mixed with, for every process: streams may end early."""
        if not isinstance(self.dataset, StreamedRows):
            return index < len(self)
        share, begin = self.batch_size * self.world, index // self.buffer_batches * self.buffer_batches
        stop = min(begin + self.buffer_batches, len(self)) * share
        least = index * share + 1 if self.keep_last else stop
        return index < len(self) and self.dataset.available(stop, begin * share) >= least

    def tokens(self, index: int) -> Tensor:
        """The (rows, tokens) ids of batch ``index``."""
        start = (index * self.world + self.rank) * self.batch_size
        stop = start + self.batch_size
        if self.keep_last and isinstance(self.dataset, StreamedRows):
            stop = self.dataset.available(stop, start)
        return self._checked(token_rows(self.dataset, start, stop)).to(self.device)

    def _checked(self, tokens: Tensor) -> Tensor:
        """Ids that the model's embedding can look up: beyond it, some devices read whatever lies there."""
        if tokens.is_floating_point():
            if self.exclude.numel():
                raise DataError("the rows are not token ids, so exclude_tokens has nothing to name: leave it out")
            return tokens
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        known = getattr(embedding, "num_embeddings", None)
        if known is not None and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
            raise DataError(
                f"token ids from {int(tokens.min())} to {int(tokens.max())}, but the model knows 0 to {known - 1}: "
                "tokenize with the model's own tokenizer"
            )
        return tokens

    def batch(self, index: int) -> dict[str, Pair]:
        """Activations of batch ``index``, or its share of a mixed block."""
        if self.buffer_batches == 1:
            return self._computed(index)
        block, place = divmod(index, self.buffer_batches)
        if self._block is None or self._block[0] != block:
            self._block = None  # freed before the next is filled
            self._block = block, self._mixed(block)
        return {name: parts[place] for name, parts in self._block[1].items()}

    def fingerprint(self) -> str:
        """The rows' number, length and a checksum of the first batch, and the model's own fingerprint."""
        return f"{len(self.dataset)} rows, {self.checksum()}, model {self.model_fingerprint()}"

    def checksum(self) -> int:
        """Of the first batch's ids, by value and place."""
        first = token_rows(self.dataset, 0, self.batch_size).cpu()
        if first.is_floating_point():
            return crc32(first.float().contiguous().numpy().tobytes())
        return int((first * torch.arange(1, first.numel() + 1).view_as(first)).sum())

    def model_fingerprint(self) -> str:
        """Of a sample of every parameter."""
        return model_fingerprint(self.model)[:16]

    def _mixed(self, block: int) -> dict[str, list[Pair]]:
        begin = block * self.buffer_batches
        batches = [self._computed(i) for i in range(begin, min(begin + self.buffer_batches, len(self)))]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        mixed: dict[str, list[Pair]] = {}
        for name in self.hookpoints:
            paired = batches[0][name].x is not batches[0][name].y
            x = torch.cat([b[name].x for b in batches])
            y = torch.cat([b[name].y for b in batches]) if paired else x
            order = torch.randperm(len(x), generator=generator).to(x.device).tensor_split(len(batches))
            mixed[name] = [Pair(xs := x[part], y[part] if paired else xs) for part in order]
        return mixed

    def _computed(self, index: int) -> dict[str, Pair]:
        tokens = self.tokens(index)
        with torch.no_grad():
            sites = _hooks.run(self.model, tokens, self.hookpoints, inputs=self.transcode)
        keep = ~torch.isin(tokens, self.exclude).flatten() if self.exclude.numel() else None
        return {name: self._pair(site, keep, name, index) for name, site in sites.items()}

    def _pair(self, site: _hooks.Site, keep: Tensor | None, name: str, index: int) -> Pair:
        y = site.output.flatten(0, -2)
        x = y if site.input is None else site.input.flatten(0, -2)
        if len(x) != len(y):
            raise DataError(
                f"{name} takes {len(x)} vectors and returns {len(y)}: it cannot be transcoded token by token"
            )
        if keep is not None and len(keep) != len(x):
            raise DataError(
                f"{name} yields {len(x)} vectors for {len(keep)} tokens, so tokens cannot be excluded there"
            )
        if self.max_norm_ratio:
            keep = ordinary(x, keep, self.max_norm_ratio)
        if keep is None:
            return Pair(x, y)
        if not keep.any():
            raise DataError(
                f"batch {index}: every token is excluded at {name}; exclude_tokens or max_norm_ratio leaves nothing"
            )
        kept = x[keep]
        return Pair(kept, kept if y is x else y[keep])


def ordinary(x: Tensor, keep: Tensor | None, ratio: float) -> Tensor:
    """Which of the vectors (..., D) have at most ``ratio`` times the median norm of those to keep, all by default."""
    norms = torch.linalg.vector_norm(x.float(), dim=-1)
    usual = norms <= ratio * (norms if keep is None else norms[keep]).median()
    return usual if keep is None else keep & usual


def limited(batches: int, most: int | None) -> int:
    """The number of batches to take, where there may be a limit."""
    if most is None:
        return batches
    check_whole("max_batches", most, 1)
    return min(most, batches)


def check_finite(pair: Pair, name: str, index: int) -> Pair:
    """Refuse a batch with NaN or infinite values, naming it and the side on which they are."""
    for side, values in (("output", pair.y), ("input", pair.x)):
        if not bool(torch.isfinite(values.sum(dtype=torch.float32))) and not bool(torch.isfinite(values).all()):
            raise not_finite(name, index, side)
    return pair


def warn_of_end(source: Source, so: str) -> None:
    """Say that a stream ended before its ``num_rows``, and what came of it."""
    assert isinstance(source, OnTheFly)
    assert isinstance(source.dataset, StreamedRows)
    message = f"{source.dataset.end()}, {so}; nothing is lost, but next time set max_examples to that number"
    warnings.warn(message, SparsifyWarning, stacklevel=3)


def not_finite(name: str, index: int, side: str) -> DataError:
    """The error for activations with NaN or infinite values."""
    return DataError(
        f"batch {index}: {name} yields values that are not finite at its {side}: the model overflows on this "
        "text (half precision?) or its weights are broken"
    )
