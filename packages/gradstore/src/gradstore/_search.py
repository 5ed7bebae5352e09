"""Top and bottom rows for many queries in one sweep of the store: blockwise GEMM from the memory map, flat memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradstore._encodings import F32
from gradstore._errors import InvalidInput
from gradstore._store import GradientStore

Metric = Literal["dot", "cos"]
I64 = NDArray[np.int64]

_BLOCK_BYTES = 4 << 20  # decoded float32 block: large enough for GEMM speed, small enough to stay in cache


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Rows and scores [q, min(k, rows)]: `top_*` from the highest score down, `bottom_*` from the lowest up."""

    top_rows: I64
    top_scores: F32
    bottom_rows: I64
    bottom_scores: F32

    def __post_init__(self) -> None:
        for array in (self.top_rows, self.top_scores, self.bottom_rows, self.bottom_scores):
            array.setflags(write=False)


def search(
    store: GradientStore,
    queries: NDArray[Any],
    k: int,
    *,
    metric: Metric = "dot",
    modules: Sequence[str] | None = None,
    block_rows: int | None = None,
) -> SearchResult:
    """The k rows with the highest and the k rows with the lowest score for each query, in one sweep.

    Example:
        >>> hits = search(store, queries, 5, metric="cos")
        >>> [store.data(row)["text"] for row in hits.top_rows[0]]

    Args:
        store: Finished, or partial: then the shards that are there are searched.
        queries: [q, width] over all modules of the store; stays float32 whatever the store's encoding.
        k: Hits per query and side; more than there are rows gives all rows.
        metric: `dot`, or `cos`: the dot product over both norms, each over the chosen modules; 0 for a zero vector.
        modules: Restrict the score to these modules.
        block_rows: Rows per GEMM; changes speed, not results (beyond the last bits of float32 sums).

    Equal scores are ordered by the lower row number, on both sides.
    """
    if k < 0:
        raise InvalidInput(f"k is {k}; ask for 0 hits or more.")
    count = len(queries)
    top, bottom = _Best(count, k), _Best(count, k)
    for start, block in _score_blocks(store, queries, metric, modules, block_rows):
        top.add(start, block)
        bottom.add(start, -block)
    top_rows, top_scores = top.sorted()
    bottom_rows, bottom_scores = bottom.sorted()
    return SearchResult(top_rows, top_scores, bottom_rows, -bottom_scores + 0)  # + 0: no negative zeros


def scores(
    store: GradientStore,
    queries: NDArray[Any],
    *,
    metric: Metric = "dot",
    modules: Sequence[str] | None = None,
    block_rows: int | None = None,
) -> F32:
    """Every score, float32 [q, rows]; arguments as in `search`. Rows of missing shards in a partial store are NaN."""
    out = np.full((len(queries), store.rows), np.nan, np.float32)
    for start, block in _score_blocks(store, queries, metric, modules, block_rows):
        out[:, start : start + block.shape[1]] = block
    return out


def _score_blocks(
    store: GradientStore, queries: NDArray[Any], metric: str, modules: Sequence[str] | None, block_rows: int | None
) -> Iterator[tuple[int, F32]]:
    """First row and scores [q, n] of one block after the other."""
    columns = store.select(modules)
    exact = _check_queries(store, queries, metric)
    if columns is not None:
        exact = np.concatenate([exact[:, part] for part in columns], axis=1)
    if metric == "cos":
        norms = np.linalg.norm(exact.astype(np.float64), axis=1, keepdims=True)
        exact = (exact / np.where(norms > 0, norms, 1)).astype(np.float32)
    step = block_rows or max(64, _BLOCK_BYTES // (4 * max(exact.shape[1], 1)))
    for shard in store.sweep():
        for start in range(shard.start, shard.stop, step):
            block = shard.cut(start, min(start + step, shard.stop))
            values = block.values(columns)
            result = exact @ values.T
            if metric == "cos":  # the row's scale cancels
                norm = _norms(values)
                np.divide(result, norm, out=result, where=norm > 0)
            elif block.scale is not None:
                result *= block.scale
            if not np.isfinite(result).all():
                raise InvalidInput(
                    f"Scores of rows {start}..{start + len(values) - 1} overflow float32. Scale the queries down."
                )
            yield start, result


def _norms(values: F32) -> F32:
    squares = np.einsum("nd,nd->n", values, values)
    norms = np.sqrt(squares)
    odd = ~((squares > 1e-30) & (squares < np.inf))  # the square left float32's range, the norm need not have
    if odd.any():
        norms[odd] = np.linalg.norm(values[odd].astype(np.float64), axis=1)
    return norms


def _check_queries(store: GradientStore, queries: NDArray[Any], metric: str) -> F32:
    if metric not in ("dot", "cos"):
        raise InvalidInput(f"Unknown metric {metric!r}; known: 'dot', 'cos'.")
    if queries.ndim != 2 or queries.shape[1] != store.width:
        raise InvalidInput(
            f"Queries have shape {queries.shape}; expected [q, {store.width}] (all modules of the store, even "
            "when `modules` restricts the score). Queries and store must come from the same plan."
        )
    exact = np.ascontiguousarray(queries, np.float32)
    finite = np.isfinite(exact).all(axis=1)
    if not finite.all():
        raise InvalidInput(f"Query {int(np.argmin(finite))} holds non-finite values.")
    return exact


class _Best:
    """The k largest scores seen so far, per query, with their rows; blocks come in row order."""

    def __init__(self, queries: int, k: int) -> None:
        self._k = k
        self._rows = np.empty((queries, 0), np.int64)
        self._scores = np.empty((queries, 0), np.float32)

    def add(self, start: int, block: F32) -> None:
        if self._k == 0:
            return
        size = self._scores.shape[1]
        if size < self._k:
            touched = np.arange(len(block))
        else:
            # later rows lose ties, so only a strictly larger score can enter
            touched = np.flatnonzero(block.max(axis=1) > self._scores[:, -1])
        if not len(touched):
            return
        grown = min(self._k, size + block.shape[1])
        rows = np.empty((len(block), grown), np.int64)
        values = np.empty((len(block), grown), np.float32)
        if size == grown:
            rows, values = self._rows, self._scores
        for query in touched:
            near = _largest(block[query], grown)
            merged_rows = np.concatenate([self._rows[query], start + near])
            merged = np.concatenate([self._scores[query], block[query, near]])
            order = np.argsort(-merged, kind="stable")[:grown]  # earlier rows stand first, so ties keep row order
            rows[query], values[query] = merged_rows[order], merged[order]
        self._rows, self._scores = rows, values

    def sorted(self) -> tuple[I64, F32]:
        """Rows and scores, best first."""
        return self._rows, self._scores


def _largest(scores: F32, k: int) -> I64:
    """Positions, ascending, of the k largest scores with all their ties (all, if there are fewer)."""
    if len(scores) <= k:
        return np.arange(len(scores))
    return np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
