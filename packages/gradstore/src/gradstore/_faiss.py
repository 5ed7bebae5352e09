"""FAISS over a store: any factory string, built once, found again only if nothing that shaped it has changed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstore._encodings import F32
from gradstore._errors import GradStoreError, InvalidInput, StoreIncomplete
from gradstore._files import checksum, write_atomic, write_errors
from gradstore._search import I64, Metric, RowTransform, SearchResult, check_queries
from gradstore._store import GradientStore


@dataclass(frozen=True, slots=True)
class FaissConfig:
    """How FAISS indexes a store.

    Example:
        >>> FaissConfig("IVF1024,SQfp16", mmap_index=True, nprobe=32)

    Args:
        index_factory: Any string of `faiss.index_factory`, e.g. `Flat`, `SQfp16`, `IVF1024,PQ64`, `HNSW32`.
        mmap_index: Search the index from its files instead of loading it.
        max_train_examples: Rows to train on, evenly spaced over the store; default: all.
        batch_size: Rows added at a time.
        num_shards: Files that the index is split into, each an index of its own over consecutive rows.
        nprobe: Cells visited per query, for IVF indexes.
    """

    index_factory: str = "Flat"
    mmap_index: bool = False
    max_train_examples: int | None = None
    batch_size: int = 1024
    num_shards: int = 1
    nprobe: int = 10


class FaissIndex:
    """A FAISS index over the rows of a store.

    Example:
        >>> index = FaissIndex.build(store, FaissConfig("IVF256,SQfp16"), metric="cos")
        >>> index.search(queries, 5).top_rows

    `build` reuses an index whose store, factory, metric, modules and transform are the same, and makes it otherwise. It
    lies beside the store, in `<store>.faiss/<hash of all these>`.
    """

    def __init__(
        self, store: GradientStore, config: FaissConfig, path: Path, metric: Metric, prepare: Callable[[F32], F32]
    ) -> None:
        """Use `build`."""
        self.path = path
        self._store = store
        self._metric: Metric = metric
        self._prepare = prepare
        faiss = _faiss()
        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if config.mmap_index else 0
        self._shards: list[tuple[int, Any]] = []
        for number, (start, _) in enumerate(_spans(store.rows, config.num_shards)):
            index = faiss.read_index(str(path / f"{number}.faiss"), flags)
            if hasattr(faiss, "try_extract_index_ivf") and (ivf := faiss.try_extract_index_ivf(index)) is not None:
                ivf.nprobe = config.nprobe
            self._shards.append((start, index))

    @classmethod
    def build(
        cls,
        store: GradientStore,
        config: FaissConfig | None = None,
        *,
        metric: Metric = "dot",
        modules: Sequence[str] | None = None,
        transform: RowTransform | None = None,
        folder: str | Path | None = None,
    ) -> FaissIndex:
        """Open the index of these settings, after making it if need be; a killed build leaves nothing that is used."""
        config = config or FaissConfig()
        if not store.complete:
            raise StoreIncomplete(f"{store.path}: an index needs a finished store. Resume the build first.")
        if metric not in ("dot", "cos"):
            raise InvalidInput(f"Unknown metric {metric!r}; known: 'dot', 'cos'.")
        if min(config.num_shards, config.batch_size, config.nprobe) < 1:
            raise InvalidInput("num_shards, batch_size and nprobe must be 1 or more.")
        prepare = partial(_prepare, store, store.select(modules), transform, metric)
        shaped_by = {
            "store": store.manifest.fingerprint,
            "index_factory": config.index_factory,
            "num_shards": config.num_shards,
            "max_train_examples": config.max_train_examples,
            "metric": metric,
            "modules": None if modules is None else list(modules),
            "transform": None if transform is None else transform.name,
            "faiss": _faiss().__version__,
        }
        parent = Path(folder) if folder is not None else store.path.with_name(store.path.name + ".faiss")
        path = parent / checksum(json.dumps(shaped_by, sort_keys=True).encode())
        if not (path / "index.json").exists():
            _write(store, config, path, prepare)
            settings = {**shaped_by, "config": asdict(config)}
            write_atomic(
                path / "index.json", [json.dumps(settings, indent=2).encode()]
            )  # last: it marks the rest whole
        return cls(store, config, path, metric, prepare)

    def search(self, queries: NDArray[Any], k: int) -> SearchResult:
        """Top and bottom k by FAISS; `queries` [q, width] over all modules, as for `search`.

        Approximate indexes may find fewer than k: the places left over hold row -1 and score NaN.
        """
        if k < 0:
            raise InvalidInput(f"k is {k}; ask for 0 hits or more.")
        exact = self._prepare(check_queries(self._store, queries, self._metric))
        k = min(k, self._store.rows)
        rows, scores = self._best(np.concatenate([exact, -exact]), k)
        count = len(queries)
        return SearchResult(rows[:count], scores[:count], rows[count:], -scores[count:] + 0)

    def _best(self, queries: F32, k: int) -> tuple[I64, F32]:
        rows = np.full((len(queries), 0), -1, np.int64)
        scores = np.empty((len(queries), 0), np.float32)
        if not len(queries):
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        for start, index in self._shards if k else ():
            found_scores, found = index.search(queries, min(k, index.ntotal))
            rows = np.concatenate([rows, np.where(found >= 0, found + start, -1)], axis=1)
            scores = np.concatenate([scores, np.where(found >= 0, found_scores, -np.inf)], axis=1)
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        return rows, np.where(rows >= 0, scores, np.float32(np.nan)).astype(np.float32)


def _write(store: GradientStore, config: FaissConfig, path: Path, prepare: Callable[[F32], F32]) -> None:
    faiss = _faiss()
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    width = prepare(np.zeros((1, store.width), np.float32)).shape[1]
    try:
        empty = faiss.index_factory(width, config.index_factory, faiss.METRIC_INNER_PRODUCT)
        if not empty.is_trained:
            empty.train(prepare(_sample(store, config.max_train_examples)))
    except RuntimeError as error:
        raise InvalidInput(
            f"FAISS refuses {config.index_factory!r} for {store.rows} rows of {width} floats: {error}"
        ) from error
    for number, (start, stop) in enumerate(_spans(store.rows, config.num_shards)):
        index = faiss.clone_index(empty)
        for first in range(start, stop, config.batch_size):
            index.add(prepare(store.block(first, min(first + config.batch_size, stop))))
        target = path / f"{number}.faiss"
        with write_errors(target):
            write_atomic(target, [faiss.serialize_index(index).data])


def _prepare(
    store: GradientStore, modules: Sequence[int] | None, transform: RowTransform | None, metric: str, rows: F32
) -> F32:
    """Rows or queries as FAISS compares them: chosen modules, then the transform, then unit length."""
    if modules is not None:
        rows = np.concatenate([rows[:, store.layout.slices[module]] for module in modules], axis=1)
    if transform is not None:
        rows = transform.apply(rows)
    if metric == "cos":
        norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        rows = (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
    return np.ascontiguousarray(rows, np.float32)


def _sample(store: GradientStore, count: int | None) -> F32:
    if count is None or count >= store.rows:
        return store.block(0, store.rows)
    rows = np.linspace(0, store.rows - 1, count).astype(np.int64)
    return np.stack([store.row(row) for row in rows.tolist()])


def _spans(rows: int, shards: int) -> Iterator[tuple[int, int]]:
    """Consecutive, nearly equal ranges; none of them empty."""
    edges = np.linspace(0, rows, min(shards, max(rows, 1)) + 1).astype(np.int64).tolist()
    return pairwise(edges)


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise GradStoreError("FAISS is not installed. Type: uv pip install 'gradstore[faiss]'") from error
