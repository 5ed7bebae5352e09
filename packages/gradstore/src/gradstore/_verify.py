"""`verify`: read every byte and say what is wrong. `info`: what a store holds, without touching a shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradstore._data import OFFSETS, check_offsets, count_rows, data_files, decode_offsets
from gradstore._encodings import is_finite
from gradstore._errors import GradStoreError, InvalidInput, StoreCorrupt
from gradstore._manifest import plan_hash
from gradstore._shard import map_file, shard_tensors
from gradstore._store import GradientStore
from gradstore._writer import shard_file


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What a store holds; `bytes` counts its finished files, manifest and journal aside."""

    path: str
    rows: int
    rows_done: int
    width: int
    modules: int
    dtype: str
    rows_per_shard: int
    shards: int
    shards_done: int
    bytes: int
    side_columns: tuple[str, ...]
    data: bool
    documents: int | None
    complete: bool
    plan_hash: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`problems` is empty when every checksum, every row and every count is right."""

    path: str
    files: int
    bytes: int
    rows: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "ok": self.ok}


def info(path: str | Path) -> StoreInfo:
    """Describe a store, finished or not.

    Example:
        >>> info("runs/a").rows
        1000
    """
    store = GradientStore.open(path, partial=True)
    manifest, shards = store.manifest, store.shards
    return StoreInfo(
        path=str(store.path),
        rows=store.rows,
        rows_done=sum(stop - start for _, start, stop in shards),
        width=store.width,
        modules=len(store.columns),
        dtype=store.dtype,
        rows_per_shard=manifest.rows_per_shard,
        shards=manifest.shards,
        shards_done=len(shards),
        bytes=sum(entry.bytes for entry in store.entries.values()),
        side_columns=tuple(manifest.side),
        data=manifest.data,
        documents=manifest.documents,
        complete=manifest.complete,
        plan_hash=plan_hash(manifest.plan),
    )


def verify(path: str | Path) -> VerifyReport:
    """Read a whole store: every checksum, every row and side column finite, every count right.

    Example:
        >>> verify("runs/a").ok
        True

    Damage is reported, not raised; only a folder without a store and an unknown format version raise.
    """
    folder = Path(path)
    try:
        store = GradientStore.open(folder, partial=True)
    except StoreCorrupt as error:
        return VerifyReport(str(folder), 0, 0, 0, (str(error),))
    problems: list[str] = []
    if not store.complete:
        problems.append(f"{folder}: unfinished, {len(store.shards)} of {store.manifest.shards} shards are there.")
    files, size, rows = 0, 0, 0
    checks: list[tuple[Callable[[GradientStore, int], int], int, tuple[str, ...]]] = [
        *((_check_shard, shard, (shard_file(shard),)) for shard in range(store.manifest.shards)),
        *((_check_data, shard, data_files(shard)) for shard in range(store.manifest.data_shards)),
        *([(_check_documents, 0, (OFFSETS,))] if store.manifest.documents is not None else []),
    ]
    for check, shard, names in checks:
        known = [store.entries[name] for name in names if name in store.entries]
        if len(known) < len(names) and store.complete:
            problems.append(f"{folder / names[0]}: not in the journal of a finished store.")
        if len(known) == len(names):
            try:
                rows += check(store, shard)
            except GradStoreError as error:
                problems.append(str(error))
        files, size = files + len(known), size + sum(entry.bytes for entry in known)
    if store.complete:
        found = sorted(path for name in ("data", "shards") for path in folder.glob(f"{name}/*"))
        strays = [path for path in found if path.relative_to(folder).as_posix() not in store.entries]
        problems += [f"{stray}: a file that the journal does not know." for stray in strays]
    return VerifyReport(str(folder), files, size, rows, tuple(problems))


def _check_shard(store: GradientStore, shard: int) -> int:
    """Rows of a sound shard; raises what is wrong with it."""
    name = shard_file(shard)
    path = store.path / name
    tensors = shard_tensors(map_file(store.path, store.entries[name], verify=True), path)
    start, stop = store.manifest.span(shard)
    sides = {name: () if side.width is None else (side.width,) for name, side in store.manifest.side.items()}
    expected = store.layout.shapes | sides
    if set(tensors) != set(expected):
        raise StoreCorrupt(f"{path}: holds {sorted(tensors)}; expected {sorted(expected)}.")
    for tensor, array in tensors.items():
        if array.shape != (stop - start, *expected[tensor]):
            raise StoreCorrupt(f"{path}: {tensor!r} has shape {array.shape}; the shard has rows {start}..{stop - 1}.")
        for first in range(0, len(array), 256):
            part = array[first : first + 256]
            finite = is_finite(part).reshape(len(part), -1).all(axis=1)
            if not finite.all():
                raise StoreCorrupt(f"{path}: row {start + first + int(np.argmin(finite))}: {tensor!r} is not finite.")
    return stop - start


def _check_documents(store: GradientStore, _: int) -> int:
    offsets = decode_offsets(map_file(store.path, store.entries[OFFSETS], verify=True))
    try:
        check_offsets(offsets, store.rows)
    except InvalidInput as error:
        raise StoreCorrupt(f"{store.path / OFFSETS}: {error}") from None
    if len(offsets) - 1 != store.manifest.documents:
        raise StoreCorrupt(
            f"{store.path / OFFSETS}: {len(offsets) - 1} documents; expected {store.manifest.documents}."
        )
    return 0


def _check_data(store: GradientStore, shard: int) -> int:
    """0, as data rows are no gradient rows; raises what is wrong with a data shard."""
    names = data_files(shard)
    lines, offsets = (map_file(store.path, store.entries[name], verify=True) for name in names)
    start, stop = store.manifest.data_span(shard)
    if count_rows(offsets) != stop - start:
        raise StoreCorrupt(f"{store.path / names[1]}: {count_rows(offsets)} rows; expected {stop - start}.")
    if np.frombuffer(offsets, "<i8", count=1, offset=len(offsets) - 8)[0] != len(lines):
        raise StoreCorrupt(f"{store.path / names[0]}: {len(lines)} bytes; its offsets end elsewhere.")
    return 0
