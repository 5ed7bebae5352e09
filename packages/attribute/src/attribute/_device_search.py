"""The exact search on another device than the CPU: the store streams through it shard by shard, one shard ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attribute._errors import RunError
from gradstore import Block, GradientStore, SearchResult


def search_on(
    device: torch.device,
    store: GradientStore,
    queries: np.ndarray,
    k: int,
    *,
    metric: Literal["dot", "cos"] = "dot",
    modules: Sequence[str] | None = None,
) -> SearchResult:
    """What :func:`gradstore.search` finds, in float32 on a device; of equal scores the earlier row comes first.

    Args:
        device: where the products are computed; memory holds the queries and two shards, one of which is being loaded.
        queries: ``[q, width]`` over all modules of the store.
        k: rows a query, at most as many as there are.

    Raises:
        RunError: queries of another width, or not finite.
    """
    if queries.ndim != 2 or queries.shape[1] != store.width or not np.isfinite(queries).all():
        raise RunError(f"queries must be finite and [q, {store.width}] as the store's rows, not {list(queries.shape)}")
    chosen = store.select(modules)
    if chosen is not None:
        queries = np.concatenate([queries[:, store.layout.slices[module]] for module in chosen], axis=1)
    asked = _unit(torch.from_numpy(queries).to(device), metric)
    top, bottom = _Best(k, largest=True), _Best(k, largest=False)
    for start, rows in _ahead(store.sweep(), chosen, device):
        scores = asked @ _unit(rows, metric).T  # [q, rows of the shard]
        numbers = torch.arange(start, start + len(rows), device=device)
        for best in (top, bottom):
            best.add(scores, numbers)
    return SearchResult(*top.arrays(), *bottom.arrays())


def _ahead(
    blocks: Iterable[Block], modules: Sequence[int] | None, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of each block on the device; the next one is decoded and copied meanwhile."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(block: Block) -> tuple[int, Tensor]:
        rows = torch.from_numpy(np.array(block.values(modules), copy=True))
        if stream is None:
            return block.start, rows.to(device)
        with torch.cuda.stream(stream):  # beside the products, which run in the stream of the caller
            rows = rows.pin_memory().to(device, non_blocking=True)
        stream.synchronize()
        return block.start, rows

    waiting: Future[tuple[int, Tensor]] | None = None
    with ThreadPoolExecutor(1, "search-load") as pool:
        for block in blocks:
            following = pool.submit(load, block)
            if waiting is not None:
                yield _handed_over(waiting.result(), stream)
            waiting = following
        if waiting is not None:
            yield _handed_over(waiting.result(), stream)


def _handed_over(loaded: tuple[int, Tensor], stream: torch.cuda.Stream | None) -> tuple[int, Tensor]:
    if stream is not None:  # the allocator must not give the memory back to the loading stream while products read it
        loaded[1].record_stream(torch.cuda.current_stream(loaded[1].device))
    return loaded


class _Best:
    """The k best scores so far, with their rows."""

    def __init__(self, k: int, *, largest: bool) -> None:
        self._k, self._largest = k, largest
        self._scores: Tensor | None = None
        self._rows: Tensor | None = None

    def add(self, scores: Tensor, numbers: Tensor) -> None:
        rows = numbers.expand(len(scores), -1)
        if self._scores is not None and self._rows is not None:  # earlier rows first, which a stable sort keeps
            scores, rows = torch.cat((self._scores, scores), 1), torch.cat((self._rows, rows), 1)
        order = scores.argsort(dim=1, descending=self._largest, stable=True)[:, : self._k]
        self._scores, self._rows = scores.gather(1, order), rows.gather(1, order)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        assert self._scores is not None
        assert self._rows is not None
        return self._rows.cpu().numpy(), self._scores.cpu().numpy()


def _unit(rows: Tensor, metric: str) -> Tensor:
    if metric == "dot":
        return rows
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)
