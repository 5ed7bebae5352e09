"""`merge`: stores of equal plans become one, byte for byte the store that one writer would have made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstore._data import data_files
from gradstore._encodings import Stored, Tensor
from gradstore._errors import InvalidInput, StoreExists
from gradstore._manifest import NAME, as_json, load_manifest, require_same_plan
from gradstore._shard import CARRIERS
from gradstore._store import GradientStore
from gradstore._writer import StoreWriter, shard_file

_DTYPES = {np.dtype(carrier): name for name, carrier in CARRIERS.items()}


def merge(
    sources: Sequence[str | Path], path: str | Path, *, meta: Any = None, rows_per_shard: int | None = None
) -> GradientStore:
    """Put the rows of finished stores behind one another in a new store.

    Example:
        >>> merge(["runs/rank0", "runs/rank1"], "runs/all")  # what each rank wrote on its own
        >>> merge(["runs/all", "runs/new"], "runs/longer")  # append

    Args:
        sources: Finished stores with the same plan, columns, encoding and side columns; row order is theirs, in turn.
        path: A new folder; or what a killed merge of the same stores left, which is then continued.
        meta: JSON of the new store; may be left out if all sources have the same.
        rows_per_shard: As for `StoreWriter.create`; default: that of the first source.

    Encoded rows are copied, never decoded. A shard that stays whole is hard-linked where the file system allows, so
    that appending costs the new rows only.
    """
    if not sources:
        raise InvalidInput("merge needs one store or more.")
    stores = [GradientStore.open(source) for source in sources]
    _require_alike(stores)
    if meta is None:
        if any(store.meta != stores[0].meta for store in stores):
            raise InvalidInput("The stores differ in their meta. Say what the merged store shall have: meta=….")
        meta = stores[0].meta
    with _target(stores, Path(path), meta, rows_per_shard or stores[0].manifest.rows_per_shard) as writer:
        if writer.manifest.data:
            _merge_data(stores, writer)
        _merge_rows(stores, writer)
    return GradientStore.open(path)


def _target(stores: Sequence[GradientStore], path: Path, meta: Any, rows_per_shard: int) -> StoreWriter:
    first = stores[0].manifest
    if (path / NAME).exists():
        there = load_manifest(path)
        same = (there.rows, there.rows_per_shard, there.meta) == (
            sum(store.rows for store in stores),
            rows_per_shard,
            as_json(meta, "meta"),
        )
        if there.complete or not same:
            raise StoreExists(f"{path}: holds another store already. Choose a new folder for the merged one.")
        return StoreWriter.resume(path, plan=first.plan)
    return StoreWriter.create(
        path,
        rows=sum(store.rows for store in stores),
        columns=first.columns,
        plan=first.plan,
        meta=meta,
        dtype=first.dtype,
        rows_per_shard=rows_per_shard,
        side_columns=first.side,
        data=first.data,
        offsets=_offsets(stores),
    )


def _require_alike(stores: Sequence[GradientStore]) -> None:
    first = stores[0]
    for store in stores[1:]:
        require_same_plan(first.plan, store.plan, f"{store.path} beside {first.path}")
        for field in ("dtype", "columns", "side", "data"):
            here, there = (getattr(s.manifest, field) for s in (first, store))
            if here != there or (field == "columns" and list(here) != list(there)):
                raise InvalidInput(f"{store.path}: {field} is {there}, but {first.path} has {here}.")
        if (first.manifest.documents is None) != (store.manifest.documents is None):
            raise InvalidInput(f"{store.path} and {first.path}: one has a row per token, the other one per document.")


def _pieces(counts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """`start` to `stop` of things counted through all sources: source, and from where to where in it."""
    offset = 0
    for source, count in enumerate(counts):
        first, last = max(start - offset, 0), min(stop - offset, count)
        if first < last:
            yield source, first, last
        offset += count


def _whole(
    counts: Sequence[int],
    spans: Sequence[Callable[[int], tuple[int, int]]],
    per_shard: Sequence[int],
    span: tuple[int, int],
) -> tuple[int, int] | None:
    """Source and number of the shard that holds exactly this span, if one does."""
    pieces = list(_pieces(counts, *span))
    if len(pieces) != 1:
        return None
    source, first, last = pieces[0]
    number = first // per_shard[source]
    return (source, number) if spans[source](number) == (first, last) else None


def _merge_rows(stores: Sequence[GradientStore], writer: StoreWriter) -> None:
    manifests = [store.manifest for store in stores]
    counts, per_shard = [m.rows for m in manifests], [m.rows_per_shard for m in manifests]
    for shard in range(writer.manifest.shards):  # those of a killed merge too: adopt and write_stored compare them
        start, stop = writer.manifest.span(shard)
        if whole := _whole(counts, [m.span for m in manifests], per_shard, (start, stop)):
            store, file = stores[whole[0]], shard_file(whole[1])
            writer.adopt(shard_file(shard), store.path / file, store.entries[file])
        else:
            pieces = [(stores[source], first, last) for source, first, last in _pieces(counts, start, stop)]
            writer.write_stored(shard, _gather(pieces))


def _gather(pieces: Sequence[tuple[GradientStore, int, int]]) -> dict[str, Tensor]:
    parts: dict[str, list[Stored]] = {}
    for store, first, last in pieces:
        per_shard = store.manifest.rows_per_shard
        for shard in range(first // per_shard, -(-last // per_shard)):
            offset = shard * per_shard
            for name, array in store.tensors(shard).items():
                parts.setdefault(name, []).append(array[max(first - offset, 0) : last - offset])
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return {name: Tensor(_DTYPES[array.dtype], array) for name, array in joined.items()}


def _merge_data(stores: Sequence[GradientStore], writer: StoreWriter) -> None:
    manifest, manifests = writer.manifest, [store.manifest for store in stores]
    counts, per_shard = [m.items for m in manifests], [m.rows_per_shard for m in manifests]
    spans = [m.data_span for m in manifests]
    shard = 0
    while shard < manifest.data_shards and (whole := _whole(counts, spans, per_shard, manifest.data_span(shard))):
        store, number = stores[whole[0]], whole[1]
        for file, source in zip(data_files(shard), data_files(number)):
            writer.adopt(file, store.path / source, store.entries[source])
        shard += 1
    rest = _pieces(counts, manifest.data_span(shard)[0], manifest.items)
    writer.write_data((stores[s].item(i) for s, a, b in rest for i in range(a, b)), first_shard=shard)


def _offsets(stores: Sequence[GradientStore]) -> NDArray[np.int64] | None:
    rows, parts = 0, [np.zeros(1, np.int64)]
    for store in stores:
        if (offsets := store.offsets) is None:
            return None
        parts.append(offsets[1:] + rows)
        rows += store.rows
    return np.concatenate(parts)
