"""Top and bottom rows for many queries in one sweep of the store: blockwise GEMM from the memory map, flat memory.

A float32 GEMM is only the filter: its last bits depend on the block's shape, the threads and the library. Rows that
could be among the best within its error bound are scored again in float64, so results are the same however the sweep
is cut, and equal rows tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from gradstore._best import Best, Exact
from gradstore._encodings import F32, Stored
from gradstore._errors import InvalidInput
from gradstore._scratch import Scratch
from gradstore._store import Block, GradientStore
from gradstore._threads import cores, in_order, one_blas_thread
from gradstore._torch_products import FloatProducts, PlaneProducts, has_int8_gemm, loaded_torch

Metric = Literal["dot", "cos"]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# first row, scores [q, n] and a bound on their errors
ScoredRows = tuple[int, F32, F32]

_BLOCK_BYTES: Final = 4 << 20  # decoded float32 block: large enough for GEMM speed, small enough to stay in cache
_EXACT_BYTES: Final = 16 << 20  # of rows in float64 that are scored again at a time
_TINY: Final = 1e-30  # norms below have squares and products that leave float32's normal range


@dataclass(frozen=True, slots=True)
class RowTransform:
    """A map of rows, such as H^-1/2, to apply to rows and queries alike before any normalisation.

    Example:
        >>> whiten = RowTransform("H^-1/2 of 3f9a, damping .1", lambda rows: rows @ root)
        >>> search(store, queries, 5, metric="cos", transform=whiten)

    `apply` takes float32 [n, d] of the chosen modules and gives float32 [n, d'], each row on its own. `name` must say
    all that the map depends on (the curvature's hash, its damping): an index of FAISS is cached under it.
    """

    name: str
    apply: Callable[[F32], F32]


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
    transform: RowTransform | None = None,
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
        transform: Map rows and queries first, as H^-1/2 does; cosines are then those of the mapped vectors. For `dot`
            alone it is cheaper to map the queries once, by H^-1.
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
    scorer = _Scorer(store, queries, metric, modules, bits, transform=transform)
    wanted = k if candidates is None else candidates
    blocks = ((start, b.scores, b.errors) for start, b in scorer.sweep(block_rows, threads))
    top, bottom = _sweep(len(queries), wanted, blocks, scorer.exact)
    if candidates is not None:
        fine = _Scorer(store, queries, metric, modules, transform=transform)
        top.rank_again(k, fine.exact)
        bottom.rank_again(k, lambda queries, rows: -fine.exact(queries, rows))
    return _result(top, bottom)


def top_and_bottom(queries: int, k: int, blocks: Iterable[ScoredRows]) -> SearchResult:
    """The result of a sweep over blocks of exact scores in row order."""

    def exact(which: I64, rows: I64) -> F32:
        raise AssertionError(f"scores of rows {rows} for queries {which} came without errors and were asked for again")

    return _result(*_sweep(queries, k, blocks, exact))


def _sweep(queries: int, k: int, blocks: Iterable[ScoredRows], exact: Exact) -> tuple[Best, Best]:
    top, bottom = Best(queries, k, exact), Best(queries, k, lambda which, rows: -exact(which, rows))
    for start, scores, errors in blocks:
        top.add(start, scores, errors)
        bottom.add(start, -scores, errors)
    for best in (top, bottom):
        best.finish()
    return top, bottom


def _result(top: Best, bottom: Best) -> SearchResult:
    return SearchResult(top.rows, top.scores, bottom.rows, -bottom.scores + 0)  # + 0: no negative zeros


def scores(
    store: GradientStore,
    queries: NDArray[Any],
    *,
    metric: Metric = "dot",
    modules: Sequence[str] | None = None,
    transform: RowTransform | None = None,
    block_rows: int | None = None,
    threads: int | None = None,
) -> F32:
    """Every score, float32 [q, rows], straight from the float32 GEMM; arguments as in `search`.

    Example:
        >>> scores(store, queries).argsort(axis=1)  # full orderings, as LDS needs them

    Rows of missing shards in a partial store are NaN.
    """
    scorer = _Scorer(store, queries, metric, modules, filtering=False, transform=transform)
    out = np.full((len(queries), store.rows), np.nan, np.float32)
    for start, block in scorer.sweep(block_rows, threads):
        out[:, start : start + block.scores.shape[1]] = block.scores
    return out


@dataclass(frozen=True, slots=True)
class _ScoredBlock:
    """GEMM scores [q, n] and a bound [q, n] on their error."""

    scores: F32
    errors: F32


class _Scorer:
    """Queries against blocks: what is computed once per search."""

    def __init__(
        self,
        store: GradientStore,
        queries: NDArray[Any],
        metric: str,
        modules: Sequence[str] | None,
        bits: int | None = None,
        *,
        filtering: bool = True,
        transform: RowTransform | None = None,
    ) -> None:
        self._store = store
        self._transform = transform
        self._bits = _check_bits(store, bits)
        self._scratch = Scratch()
        self._cos = metric == "cos"
        self._modules = store.select(modules)
        chosen = check_queries(store, queries, metric)
        if self._modules is not None:
            chosen = np.concatenate([chosen[:, store.layout.slices[m]] for m in self._modules], axis=1)
        stored = chosen.shape[1]
        if transform is not None:
            chosen = _mapped(transform, chosen)
        self._exact = chosen.astype(np.float64)
        self._norms = np.sqrt((self._exact * self._exact).sum(axis=1))
        if self._cos:
            chosen = (self._exact / np.where(self._norms > 0, self._norms, 1)[:, None]).astype(np.float32)
        self._queries = np.ascontiguousarray(chosen.T)  # [d, q]: the faster orientation for tall blocks
        width = chosen.shape[1]
        # Higham and Mary 2019: rounding errors of a length-n sum grow like sqrt(n) u, not n u; 4 sqrt(n) is generous
        self._relative = (4 * width**0.5 + 8) * 2.0**-24
        self._step = max(16, _BLOCK_BYTES // (4 * max(width, stored, len(chosen), 1)))
        self._together = max(1, _EXACT_BYTES // (8 * max(width, stored, 1)))
        self._lost: F64 = np.zeros(len(chosen))
        if transform is not None:
            self._products = self._numpy_products
            self._relative *= 64  # the map rounds too, by its condition number times as much
        elif filtering and len(chosen) and width and (fast := self._torch_products()) is not None:
            self._products, self._step, self._lost = fast, fast.step, fast.error
            self._relative *= 4  # its sums cancel a constant part
        else:
            self._products = self._numpy_products

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

    def _numpy_products(self, tensors: Mapping[str, Stored]) -> F32:
        return self._store.layout.products(tensors, self._queries, self._modules, self._bits, self._scratch)

    def _torch_products(self) -> FloatProducts | PlaneProducts | None:
        torch, layout = loaded_torch(), self._store.layout
        if torch is None:
            return None
        if layout.bits is None:
            return FloatProducts(torch, layout, self._queries, self._modules)
        if not has_int8_gemm(torch):
            return None
        return PlaneProducts(torch, layout, self._queries, self._modules, self._bits)

    def exact(self, queries: I64, rows: I64) -> F32:
        """Float64 scores of pairs of a query and a row, rounded to float32; each row is decoded once or twice."""
        out = np.empty(len(rows), np.float32)
        order = np.argsort(rows, kind="stable")
        shards = rows[order] // self._store.manifest.rows_per_shard
        cuts = np.flatnonzero(np.diff(shards)) + 1
        for of_shard in np.split(order, cuts) if len(order) else ():
            block = self._store.shard(int(rows[of_shard[0]]) // self._store.manifest.rows_per_shard)
            for some in np.array_split(of_shard, -(-len(of_shard) // self._together)):
                distinct, which = np.unique(rows[some] - block.start, return_inverse=True)
                values = block.values(self._modules, self._bits, distinct)
                if self._transform is not None:  # one by one: a row's score must not depend on those beside it
                    values = np.concatenate([_mapped(self._transform, row[None]) for row in values])
                values = values.astype(np.float64)
                dot = (values[which] * self._exact[queries[some]]).sum(axis=1)
                if self._cos:
                    norms = np.sqrt(np.multiply(values, values).sum(axis=1))
                    lengths = self._norms[queries[some]] * norms[which]
                    dot = np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0)
                out[some] = dot.astype(np.float32)
        return out

    def _score(self, block: Block) -> tuple[int, _ScoredBlock]:
        norm = block.norm  # of whole rows with all their bits; it bounds that of some modules, which is all `dot` needs
        mapped: F32 | None = None
        if self._transform is not None:
            mapped = _mapped(self._transform, block.values(self._modules, self._bits))
            norm = _norms(mapped)
        elif self._bits is not None or (self._cos and self._modules is not None):
            norm = _norms(block.values(self._modules, self._bits))
        with np.errstate(over="ignore", invalid="ignore"):
            result = self._products(block.tensors) if mapped is None else mapped @ self._queries
            if self._cos:
                result = np.divide(result, norm[:, None], out=np.zeros_like(result), where=norm[:, None] > 0)
            result = np.ascontiguousarray(result.T)
        if not np.isfinite(result).all():
            rows = f"{block.start}..{block.stop - 1}"
            raise InvalidInput(f"Scores of rows {rows} overflow float32. Scale the queries down.")
        tiny = (norm > 0) & (norm < _TINY)
        if self._cos:  # the queries have length 1 here
            reach = np.where(self._norms > 0, self._relative + self._lost, 0).astype(np.float32)
            errors = np.broadcast_to(reach[:, None], result.shape)
        else:
            reach = self._relative * self._norms + self._lost
            errors = (reach[:, None] * norm).astype(np.float32)
        if tiny.any():  # float32 lost track of these
            errors = np.where(tiny & (self._norms > 0)[:, None], np.float32(np.inf), errors)
        return block.start, _ScoredBlock(result, errors)


def _mapped(transform: RowTransform, rows: F32) -> F32:
    """The map's image of rows [n, d], or what is wrong with it."""
    found = np.ascontiguousarray(transform.apply(rows), np.float32)
    if found.ndim != 2 or len(found) != len(rows):
        raise InvalidInput(f"The transform {transform.name!r} made {found.shape} of {rows.shape}; expected a row each.")
    if not np.isfinite(found).all():
        raise InvalidInput(f"The transform {transform.name!r} made values that are not finite of rows that are.")
    return found


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
