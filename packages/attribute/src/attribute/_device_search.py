"""The exact search on another device than the CPU: the store streams through it shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from attribute._errors import RunError
from gradstore import GradientStore, SearchResult


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
        device: where the products are computed; memory holds the queries and one shard.
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
    for block in store.sweep():
        rows = torch.from_numpy(np.array(block.values(chosen), copy=True)).to(device)
        scores = asked @ _unit(rows, metric).T  # [q, rows of the shard]
        numbers = torch.arange(block.start, block.stop, device=device)
        for best in (top, bottom):
            best.add(scores, numbers)
    return SearchResult(*top.arrays(), *bottom.arrays())


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
