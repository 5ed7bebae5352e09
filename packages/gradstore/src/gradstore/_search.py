"""Top and bottom rows for many queries in one sweep of the store: blockwise GEMM from the memory map, flat memory.

A float32 GEMM is only the filter: its last bits depend on the block's shape, the threads and the library. Rows that
could be among the best within its error bound are scored again in float64, so results are the same however the sweep
is cut, and equal rows tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from gradstore._encodings import F32
from gradstore._errors import InvalidInput
from gradstore._scratch import Scratch
from gradstore._store import Block, GradientStore
from gradstore._threads import cores, in_order, one_blas_thread

Metric = Literal["dot", "cos"]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# first row, scores [q, n], a bound on their errors, and the exact scores of a query for rows of the block
ScoredRows = tuple[int, F32, F32, Callable[[int, I64], F32]]

_BLOCK_BYTES: Final = 4 << 20  # decoded float32 block: large enough for GEMM speed, small enough to stay in cache
_TINY: Final = 1e-30  # norms below have squares and products that leave float32's normal range


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
    bits: int | None = None,
    candidates: int | None = None,
    block_rows: int | None = None,
    threads: int | None = None,
) -> SearchResult:
    """The k rows with the highest and the k rows with the lowest score for each query, in one sweep.

    Example:
        >>> hits = search(store, queries, 5, metric="cos")
        >>> [store.data(row)["text"] for row in hits.top_rows[0]]

    Args:
        store: Finished, or partial: then the shards that are there are searched.
        queries: [q, width] over all modules of the store; taken as float32, whatever the store's encoding.
        k: Hits per query and side; more than there are rows gives all rows.
        metric: `dot`, or `cos`: the dot product over both norms, each over the chosen modules; 0 for a zero vector.
        modules: Restrict the score to these modules.
        bits: Read only the first 1, 2 or 4 bit planes of a store that has more: faster, coarser.
        candidates: With `bits`: take this many rows per query and side from the coarse scan and rank them again with
            all planes. Without it the coarse scores themselves are returned.
        block_rows: Rows per GEMM; changes the speed, never the result.
        threads: Blocks worked on at once; default: the cores this process may use. Never changes the result.

    Scores are float64 sums rounded to float32. Equal ones are ordered by the lower row number, on both sides.
    """
    if k < 0:
        raise InvalidInput(f"k is {k}; ask for 0 hits or more.")
    if candidates is not None and (bits is None or candidates < k):
        raise InvalidInput(f"candidates is {candidates}; it goes with `bits` and must be at least k = {k}.")
    scorer = _Scorer(store, queries, metric, modules, bits)
    wanted = k if candidates is None else candidates
    blocks = ((start, b.scores, b.errors, b.exact) for start, b in scorer.sweep(block_rows, threads))
    if candidates is None:
        return top_and_bottom(len(queries), wanted, blocks)
    top, bottom = _sweep(len(queries), wanted, blocks)
    fine = _Scorer(store, queries, metric, modules)
    top.rank_again(k, fine.exact)
    bottom.rank_again(k, lambda query, rows: -fine.exact(query, rows))
    return _result(top, bottom)


def top_and_bottom(queries: int, k: int, blocks: Iterable[ScoredRows]) -> SearchResult:
    """The result of a sweep over blocks in row order."""
    return _result(*_sweep(queries, k, blocks))


def _sweep(queries: int, k: int, blocks: Iterable[ScoredRows]) -> tuple[_Best, _Best]:
    top, bottom = _Best(queries, k), _Best(queries, k)
    for start, scores, errors, exact in blocks:
        top.add(start, scores, errors, exact)
        bottom.add(start, -scores, errors, lambda query, rows, exact=exact: -exact(query, rows))
    return top, bottom


def _result(top: _Best, bottom: _Best) -> SearchResult:
    return SearchResult(top.rows, top.scores, bottom.rows, -bottom.scores + 0)  # + 0: no negative zeros


def scores(
    store: GradientStore,
    queries: NDArray[Any],
    *,
    metric: Metric = "dot",
    modules: Sequence[str] | None = None,
    block_rows: int | None = None,
    threads: int | None = None,
) -> F32:
    """Every score, float32 [q, rows], straight from the float32 GEMM; arguments as in `search`.

    Example:
        >>> scores(store, queries).argsort(axis=1)  # full orderings, as LDS needs them

    Rows of missing shards in a partial store are NaN.
    """
    scorer = _Scorer(store, queries, metric, modules)
    out = np.full((len(queries), store.rows), np.nan, np.float32)
    for start, block in scorer.sweep(block_rows, threads):
        out[:, start : start + block.scores.shape[1]] = block.scores
    return out


@dataclass(frozen=True, slots=True)
class _ScoredBlock:
    """GEMM scores [q, n], a bound [q, n] on their error, and float64 scores of chosen rows rounded to float32."""

    scores: F32
    errors: F32
    exact: Callable[[int, I64], F32]


class _Scorer:
    """Queries against blocks: what is computed once per search."""

    def __init__(
        self,
        store: GradientStore,
        queries: NDArray[Any],
        metric: str,
        modules: Sequence[str] | None,
        bits: int | None = None,
    ) -> None:
        self._store = store
        self._bits = _check_bits(store, bits)
        self._scratch = Scratch()
        self._cos = metric == "cos"
        self._modules = store.select(modules)
        chosen = check_queries(store, queries, metric)
        if self._modules is not None:
            chosen = np.concatenate([chosen[:, store.layout.slices[m]] for m in self._modules], axis=1)
        self._exact = chosen.astype(np.float64)
        self._norms = np.sqrt((self._exact * self._exact).sum(axis=1))
        if self._cos:
            chosen = (self._exact / np.where(self._norms > 0, self._norms, 1)[:, None]).astype(np.float32)
        self._queries = np.ascontiguousarray(chosen.T)  # [d, q]: the faster orientation for tall blocks
        width = chosen.shape[1]
        # Higham and Mary 2019: rounding errors of a length-n sum grow like sqrt(n) u, not n u; 4 sqrt(n) is generous
        self._relative = (4 * width**0.5 + 8) * 2.0**-24
        self._step = max(16, _BLOCK_BYTES // (4 * max(width, len(chosen), 1)))

    def sweep(self, block_rows: int | None, threads: int | None) -> Iterator[tuple[int, _ScoredBlock]]:
        """First row and scores of one block after the other, in row order."""
        if block_rows is not None and block_rows < 1:
            raise InvalidInput(f"block_rows is {block_rows}; a block has 1 row or more.")
        if threads is not None and threads < 1:
            raise InvalidInput(f"threads is {threads}; a search needs 1 or more.")
        step = block_rows or self._step
        blocks = (
            shard.cut(start, min(start + step, shard.stop))
            for shard in self._store.sweep()
            for start in range(shard.start, shard.stop, step)
        )
        with one_blas_thread():
            yield from in_order((partial(self._score, block) for block in blocks), threads or cores())

    def exact(self, query: int, rows: I64) -> F32:
        """Exact scores of rows from anywhere in the store."""
        out = np.empty(len(rows), np.float32)
        for place in np.argsort(rows, kind="stable").tolist():
            block = self._store.one(int(rows[place]))
            out[place] = self._exact_scores(query, block.values(self._modules, self._bits))[0]
        return out

    def _exact_scores(self, query: int, values: F32) -> F32:
        picked = values.astype(np.float64)
        dot = (picked * self._exact[query]).sum(axis=1)
        if self._cos:
            lengths = self._norms[query] * np.sqrt(np.multiply(picked, picked, out=picked).sum(axis=1))
            dot = np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0)
        return dot.astype(np.float32)

    def _score(self, block: Block) -> tuple[int, _ScoredBlock]:
        norm = block.norm  # of whole rows with all their bits; it bounds that of some modules, which is all `dot` needs
        if self._bits is not None or (self._cos and self._modules is not None):
            norm = _norms(block.values(self._modules, self._bits))
        with np.errstate(over="ignore", invalid="ignore"):
            result = block.products(self._queries, self._modules, self._bits, self._scratch).T
            if self._cos:
                result = np.divide(result, norm, out=np.zeros_like(result), where=norm > 0)
        if not np.isfinite(result).all():
            rows = f"{block.start}..{block.stop - 1}"
            raise InvalidInput(f"Scores of rows {rows} overflow float32. Scale the queries down.")
        if self._cos:
            errors = np.broadcast_to(np.where((norm > 0) & (norm < _TINY), np.inf, self._relative), result.shape)
        else:
            bound = np.where((norm > 0) & (norm < _TINY), np.inf, self._relative * norm.astype(np.float64))
            errors = np.where(self._norms[:, None] > 0, self._norms[:, None] * bound, 0)

        def exact(query: int, rows: I64) -> F32:
            return self._exact_scores(query, block.values(self._modules, self._bits, rows))

        return block.start, _ScoredBlock(result, errors.astype(np.float32), exact)


def _check_bits(store: GradientStore, bits: int | None) -> int | None:
    if bits is None or bits == store.layout.bits:
        return None
    fewer = [b for b in (1, 2, 4) if b < (store.layout.bits or 0)]
    if bits not in fewer:
        choice = f"one of {fewer}, or leave it out" if fewer else "leave it out"
        raise InvalidInput(f"bits is {bits}, but the store holds {store.dtype}: {choice}.")
    return bits


def check_queries(store: GradientStore, queries: NDArray[Any], metric: str) -> F32:
    """Queries as float32 [q, width], or the reason why they are none."""
    if metric not in ("dot", "cos"):
        raise InvalidInput(f"Unknown metric {metric!r}; known: 'dot', 'cos'.")
    if queries.ndim != 2 or queries.shape[1] != store.width:
        raise InvalidInput(
            f"Queries have shape {queries.shape}; expected [q, {store.width}] (all modules of the store, even when "
            "`modules` restricts the score). Queries and store must come from the same plan."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.ascontiguousarray(queries, np.float32)
    finite = np.isfinite(exact).all(axis=1)
    if not finite.all():
        raise InvalidInput(f"Query {int(np.argmin(finite))} holds values that are not finite in float32.")
    return exact


def _norms(values: F32) -> F32:
    with np.errstate(over="ignore"):
        squares = np.einsum("nd,nd->n", values, values)
    norms = np.sqrt(squares)
    odd = ~((squares > _TINY) & (squares < np.inf))  # the square left float32's range, the norm need not have
    if odd.any():
        norms[odd] = np.linalg.norm(values[odd].astype(np.float64), axis=1)
    return norms


class _Best:
    """The k largest exact scores seen so far, per query, with their rows; blocks come in row order."""

    def __init__(self, queries: int, k: int) -> None:
        self._k = k
        self.rows = np.empty((queries, 0), np.int64)
        self.scores = np.empty((queries, 0), np.float32)

    def add(self, start: int, scores: F32, errors: F32, exact: Callable[[int, I64], F32]) -> None:
        """Take in the next block: GEMM scores [q, n] right to within `errors`, and the way to exact ones."""
        size = self.scores.shape[1]
        grown = min(self._k, size + scores.shape[1])
        if grown == 0:
            return
        upper = scores + errors
        old_rows, old_scores = self.rows, self.scores
        if size < grown:
            self.rows = np.empty((len(scores), grown), np.int64)
            self.scores = np.empty((len(scores), grown), np.float32)
            touched = np.arange(len(scores))
        else:  # later rows lose ties, so only what may be strictly larger can enter
            touched = np.flatnonzero((upper > old_scores[:, -1:]).any(axis=1))
        for query in touched.tolist():
            floor = _kth_largest(scores[query] - errors[query], grown)
            if size == grown:
                floor = max(floor, np.nextafter(old_scores[query, -1], np.float32(np.inf)))
            near = np.flatnonzero(upper[query] >= floor)
            rows = np.concatenate([old_rows[query], start + near])
            values = np.concatenate([old_scores[query], exact(query, near)])
            order = np.argsort(-values, kind="stable")[:grown]  # earlier rows stand first, so ties keep row order
            self.rows[query], self.scores[query] = rows[order], values[order]

    def rank_again(self, k: int, exact: Callable[[int, I64], F32]) -> None:
        """Keep the k best by another score."""
        for query, rows in enumerate(self.rows):
            scores = exact(query, rows)
            order = np.lexsort((rows, -scores))
            self.rows[query], self.scores[query] = rows[order], scores[order]
        self.rows, self.scores = self.rows[:, :k].copy(), self.scores[:, :k].copy()


def _kth_largest(scores: F32, k: int) -> float:
    return -np.inf if len(scores) <= k else float(np.partition(scores, len(scores) - k)[len(scores) - k])
