"""`StoreWriter`: shards in any order, each whole or absent, encoded and written beside the caller's compute."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstore import _journal, _manifest, _parts
from gradstore._data import OFFSETS, check_offsets, data_files, encode_offsets, encode_rows
from gradstore._encodings import Layout, Tensor, is_finite
from gradstore._errors import GradStoreError, InvalidInput, StoreCorrupt, StoreExists, StoreIncomplete
from gradstore._files import TEMP_SUFFIX, WriterLock, checksum, checksum_of, sync_folder, write_atomic, write_errors
from gradstore._journal import Entry, Journal
from gradstore._manifest import Side
from gradstore._shard import shard_parts

_THREADS = 2  # one shard is encoded while another waits for the disk
_QUEUED_SHARDS = 1  # with those in work three shards at most are held, so memory stays flat
_SAFETENSORS = {"fp32": "F32", "fp64": "F64", "int32": "I32", "int64": "I64"}

_OWN = re.compile(r"(shards/\d{5,}\.safetensors|data/\d{5,}\.(jsonl|offsets\.npy))(\.tmp)?")

Job = tuple[int, NDArray[np.float32], dict[str, Tensor]]


class StoreWriter:
    """Write a store shard by shard.

    Example:
        >>> with StoreWriter.create("runs/a", rows=1000, columns={"h.0.attn": 256}, plan={"model": "m"}) as writer:
        ...     writer.write_data({"text": text} for text in texts)
        ...     for shard, start, stop in writer.pending:
        ...         writer.write(shard, gradients[start:stop], {"loss": loss, "tokens": tokens, "sq_norm": sq_norm})

    Leaving the block finishes the store. After a crash, `StoreWriter.resume` gives a writer whose `pending` holds what
    is left; the finished folder has the same bytes as one written without interruption, in whatever order.
    """

    def __init__(self, path: Path, lock: WriterLock, *, part: int | None = None) -> None:
        """Use `create`, `resume` or `join`."""
        self.path = path
        self._lock = lock
        self.manifest = _manifest.load_manifest(path)
        self._owns = part is None
        name = _journal.NAME if part is None else _parts.part_journal(part)
        self._journal = Journal(path, self.manifest.journal, name)
        self._layout = Layout(self.manifest.dtype, self.manifest.columns)
        self._accepted = {s for s in range(self.manifest.shards) if shard_file(s) in self._journal.entries}
        self._queue: Queue[Job | None] = Queue(_QUEUED_SHARDS)
        self._error: BaseException | None = None
        self._threads: list[Thread] = []

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        rows: int,
        columns: Mapping[str, int],
        plan: Any,
        meta: Any = None,
        dtype: str = "fp32",
        rows_per_shard: int | None = None,
        side_columns: Sequence[str] | Mapping[str, str | Side] = ("loss", "tokens", "sq_norm"),
        data: bool = True,
        offsets: NDArray[Any] | None = None,
    ) -> StoreWriter:
        """Make an empty store of known size.

        Args:
            path: A folder that does not exist yet, or is empty.
            rows: Rows of the finished store; row i is example i of the dataset.
            columns: Module name → floats per row, in the order in which `write` gets them.
            plan: Any JSON that says how the rows are made; `resume` refuses another one.
            meta: Any further JSON; kept, not compared.
            dtype: `fp32`, `fp16`, `bf16`, or `int8`, `int4`, `int2`, `int1` (bit planes, a scale per module).
            rows_per_shard: Default: at most 64 MiB and 8,192 rows, about a sixteenth of a small store.
            side_columns: Numbers beside each row: names (`tokens` is int32, others fp32), or name → dtype or `Side`.
            data: Whether the dataset rows are kept too (`write_data`).
            offsets: For a store of tokens: int [documents + 1], document d has rows `offsets[d]` to `offsets[d + 1]`;
                documents may be empty. `write_data` then takes one row per document.
        """
        store = Path(path)
        manifest = _manifest.new_manifest(
            rows=rows,
            columns=columns,
            plan=plan,
            meta=meta,
            dtype=dtype,
            rows_per_shard=rows_per_shard,
            side=side_columns,
            data=data,
            documents=None if offsets is None else len(offsets) - 1,
        )
        starts = None if offsets is None else check_offsets(offsets, rows)
        _require_free(store)
        with write_errors(store):
            store.mkdir(parents=True, exist_ok=True)
            sync_folder(store.parent)
        lock = WriterLock(store)
        try:
            _require_free(store)  # again, now that no other writer can be at it
            _parts.remove(store)
            for folder in ("shards", "data"):
                if (store / folder).is_dir():
                    shutil.rmtree(store / folder)
                with write_errors(store / folder):
                    (store / folder).mkdir()
            lines: list[bytes] = []
            if starts is not None:
                lines.append(Entry(OFFSETS, *write_atomic(store / OFFSETS, [encode_offsets(starts)])).render())
            write_atomic(store / _journal.NAME, lines)
            manifest.save(store)
            return cls(store, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(cls, path: str | Path, *, plan: Any) -> StoreWriter:
        """Continue an interrupted store (a finished one gives a writer with nothing pending).

        Raises `PlanMismatch` naming the first differing field, `StoreLocked` if another process writes the store, and
        `StoreCorrupt` if a finished file is gone or has another size.
        """
        store = Path(path)
        _manifest.load_manifest(store)  # before the lock file is made in a folder that is no store
        lock = WriterLock(store)
        try:
            writer = cls(store, lock)
            _manifest.require_same_plan(writer.manifest.plan, plan, str(store))
            writer._take_over()
            writer._clean()
            return writer
        except BaseException:
            lock.release()
            raise

    @classmethod
    def join(cls, path: str | Path, part: int) -> StoreWriter:
        """Write some of the shards beside the writer that made or resumed the store and does not finish it meanwhile.

        Example:
            >>> with StoreWriter.join("runs/a", part=2) as writer:  # in another process
            ...     writer.write(7, gradients[start:stop], side)

        Args:
            path: The unfinished store, on a file system that both processes see.
            part: A number from 1 that no other process has.

        The processes agree among themselves who writes which shard. Leaving the block keeps the shards; the owner
        counts them in when it finishes, or when it resumes after a crash.
        """
        store = Path(path)
        _manifest.load_manifest(store)
        lock = _parts.lock_part(store, part)
        try:
            return cls(store, lock, part=part)
        except BaseException:
            lock.release()
            raise

    @property
    def pending(self) -> list[tuple[int, int, int]]:
        """`(shard, start, stop)` of every shard not handed to `write` yet."""
        spans = ((shard, *self.manifest.span(shard)) for shard in range(self.manifest.shards))
        return [span for span in spans if span[0] not in self._accepted]

    @property
    def data_pending(self) -> bool:
        """Whether `write_data` still has something to write."""
        return bool(self._missing_data())

    def write(self, shard_index: int, rows: NDArray[Any], side: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Hand over one shard; returns once it is queued. The arrays are copied and may be reused at once.

        Args:
            shard_index: From `pending`.
            rows: [stop - start, width], modules side by side in the order of `columns`; cast to float32, then encoded.
            side: One array [stop - start] (or [stop - start, w]) per side column, no more and no fewer.

        Encoding, checksum and write run in threads of their own; what goes wrong there (non-finite values, a full
        disk) is raised by the next call or by `finish`.
        """
        self._raise_pending_error()
        if not 0 <= shard_index < self.manifest.shards:
            raise InvalidInput(f"There is no shard {shard_index}; the store has {self.manifest.shards}.")
        if shard_index in self._accepted:
            raise InvalidInput(f"Shard {shard_index} is already written; `pending` lists those that are not.")
        start, stop = self.manifest.span(shard_index)
        if rows.shape != (stop - start, self.manifest.width):
            raise InvalidInput(
                f"Shard {shard_index} got rows of shape {rows.shape}; expected {(stop - start, self.manifest.width)} "
                f"(rows {start}..{stop - 1}, all {len(self.manifest.columns)} modules side by side)."
            )
        with np.errstate(over="ignore", invalid="ignore"):  # what leaves float32 is refused by name below
            job = shard_index, np.array(rows, np.float32), self._side_tensors(side or {}, start, stop)
        if not self._threads:
            self._threads = [Thread(target=self._work, name="gradstore-writer", daemon=True) for _ in range(_THREADS)]
            for thread in self._threads:
                thread.start()
        self._queue.put(job)
        self._accepted.add(shard_index)

    def write_stored(self, shard_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard whose tensors another store of the same layout holds, encoded as they are."""
        self._raise_pending_error()
        if (file := shard_file(shard_index)) in self._journal.entries:
            self._require_stored(file, checksum_of(shard_parts(tensors)))
            return
        self._write_tensors(shard_index, tensors)
        self._accepted.add(shard_index)

    def adopt(self, file: str, source: Path, entry: Entry) -> None:
        """Take over a finished file of another store, by hard link if the file system allows, else by copy."""
        self._raise_pending_error()
        if file in self._journal.entries:
            self._require_stored(file, entry.checksum)
            return
        target = self.path / file
        temp = target.with_name(target.name + TEMP_SUFFIX)
        try:
            os.link(source, temp)
        except OSError:
            with open(source, "rb") as stream:
                write_atomic(target, iter(lambda: stream.read(1 << 24), b""))
        else:
            with write_errors(target):
                os.replace(temp, target)
                sync_folder(target.parent)
        self._journal.add(Entry(file, entry.bytes, entry.checksum))
        self._accepted = {s for s in range(self.manifest.shards) if shard_file(s) in self._journal.entries}

    def write_data(self, rows: Iterable[Mapping[str, Any]], *, first_shard: int = 0) -> None:
        """Store the dataset rows, once, before or after the gradients.

        Call it again after a crash with the same rows: shards of text that are there are compared, not rewritten, and a
        dataset that changed in between is refused. With `first_shard`, `rows` begin where that shard begins.
        """
        self._raise_pending_error()
        if not self.manifest.data:
            raise InvalidInput(f"{self.path}: the store was created with data=False.")
        items = self.manifest.items
        total = self.manifest.data_span(first_shard)[0]
        for shard, (count, *parts) in enumerate(encode_rows(rows, self.manifest.rows_per_shard), first_shard):
            start, stop = self.manifest.data_span(shard)
            total += count
            if shard >= self.manifest.data_shards or total != stop:
                break
            for file, part in zip(data_files(shard), parts):
                self._add_data(file, part, start, stop)
        if total != items:
            more = " or more" if total > items else ""
            unit = "rows" if self.manifest.documents is None else "documents"
            raise InvalidInput(f"write_data got {total}{more} rows; the store has {items} {unit}.")

    def flush(self) -> None:
        """Wait until all that was handed over is on disk; what went wrong there is raised here."""
        self._drain()
        self._raise_pending_error()

    def finish(self) -> None:
        """Wait for the writer threads, check that nothing is missing, and mark the store complete in one step.

        A writer that joined has nothing more to check than that its own shards are on disk.
        """
        self.flush()
        if not self._owns:
            self.close()
            return
        self._take_over()
        self._accepted = {s for s in self._accepted if shard_file(s) in self._journal.entries}
        if self.pending:
            shard, start, stop = self.pending[0]
            raise StoreIncomplete(
                f"{self.path}: {len(self.pending)} of {self.manifest.shards} shards are missing, the first is "
                f"shard {shard} (rows {start}..{stop - 1}). Write them, or close() and resume later."
            )
        if self._missing_data():
            raise StoreIncomplete(f"{self.path}: the dataset rows are missing. Call write_data before finish.")
        if not self.manifest.complete:
            self.manifest = self.manifest.sealed(self._journal.seal())
            self.manifest.save(self.path)
        self.close()

    def close(self) -> None:
        """Write what is queued and let go of the lock; the store can be resumed. Calling it twice is harmless."""
        self._drain()
        self._journal.close()
        self._lock.release()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.finish()
            finally:
                self.close()
        else:
            with suppress(GradStoreError):  # the block's own error is the one to show
                self.close()

    def _take_over(self) -> None:
        _parts.take_over(self.path, self._journal)
        self._accepted |= {s for s in range(self.manifest.shards) if shard_file(s) in self._journal.entries}

    def _require_stored(self, file: str, digest: str) -> None:
        """Refuse to continue beside a finished file that holds something else than what would be written now."""
        if self._journal.entries[file].checksum != digest:
            raise InvalidInput(
                f"{self.path / file}: was begun with other rows than those given now. "
                "Continue it with the same, or choose a new folder."
            )

    def _side_tensors(self, side: Mapping[str, NDArray[Any]], start: int, stop: int) -> dict[str, Tensor]:
        expected = self.manifest.side
        if set(side) != set(expected):
            raise InvalidInput(f"Got side columns {sorted(side)}; the store has {sorted(expected)}.")
        tensors: dict[str, Tensor] = {}
        for name, spec in expected.items():
            shape = (stop - start,) if spec.width is None else (stop - start, spec.width)
            if side[name].shape != shape:
                raise InvalidInput(f"Side column {name!r} has shape {side[name].shape}; expected {shape}.")
            array = np.array(side[name], _manifest.SIDE_DTYPES[spec.dtype])
            if array.dtype.kind == "i" and not np.array_equal(array, side[name]):
                raise InvalidInput(f"Side column {name!r} holds values that are not {spec.dtype} numbers.")
            finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if not finite.all():
                raise InvalidInput(f"Row {start + int(np.argmin(finite))}: side column {name!r} is not finite.")
            tensors[name] = Tensor(_SAFETENSORS[spec.dtype], array)
        return tensors

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:  # after a failure the rest is drained, so that the caller never blocks
                try:
                    self._write_shard(*job)
                except BaseException as error:
                    self._error = error

    def _write_shard(self, shard: int, rows: NDArray[np.float32], side: dict[str, Tensor]) -> None:
        tensors = self._layout.encode(rows)
        self._require_finite(tensors, rows, self.manifest.span(shard)[0])
        self._write_tensors(shard, {**tensors, **side})

    def _write_tensors(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        file = shard_file(shard)
        size, digest = write_atomic(self.path / file, shard_parts(tensors))
        self._journal.add(Entry(file, size, digest))

    def _require_finite(self, tensors: Mapping[str, Tensor], rows: NDArray[np.float32], start: int) -> None:
        bad = ~np.isfinite(tensors["norm"].array)
        if not bad.any():
            return
        row = int(np.argmax(bad))
        # where only the encoding overflows, the encoded entries tell which; bit planes hold no infinities
        finite = is_finite(tensors["rows"].array[row]) if "rows" in tensors else np.isfinite(rows[row])
        if finite.all():
            raise InvalidInput(f"Row {start + row}: its norm overflows float32. Look for an exploding loss.")
        column = int(np.argmin(finite))
        starts = np.cumsum([0, *self.manifest.columns.values()])
        which = int(np.searchsorted(starts, column, side="right")) - 1
        value = float(rows[row, column])
        cause = f"overflows {self.manifest.dtype}" if np.isfinite(value) else "is not finite"
        raise InvalidInput(
            f"Row {start + row}, module {list(self.manifest.columns)[which]!r}, entry {column - int(starts[which])}: "
            f"{value!r} {cause}. Look for NaN weights or an exploding loss in that example."
        )

    def _add_data(self, file: str, part: bytes, start: int, stop: int) -> None:
        known = self._journal.entries.get(file)
        if known is None:
            self._journal.add(Entry(file, *write_atomic(self.path / file, [part])))
        elif known.checksum != checksum(part):
            raise InvalidInput(
                f"{self.path / file}: dataset rows {start}..{stop - 1} differ from those already stored. "
                "Resume with the dataset that the store was begun with."
            )

    def _missing_data(self) -> list[str]:
        files = (file for shard in range(self.manifest.data_shards) for file in data_files(shard))
        return [file for file in files if file not in self._journal.entries]

    def _clean(self) -> None:
        """Remove what a killed writer left behind, and refuse to build on finished files that are gone or cut."""
        for entry in self._journal.entries.values():
            path = self.path / entry.file
            size = path.stat().st_size if path.exists() else None
            if size != entry.bytes:
                raise StoreCorrupt(
                    f"{path}: {'missing' if size is None else f'{size} bytes'}; the journal says {entry.bytes} bytes. "
                    "Restore it from a copy, or run repair, then resume."
                )
        if self.manifest.documents is not None and OFFSETS not in self._journal.entries:
            raise StoreCorrupt(f"{self.path / OFFSETS}: missing or damaged; the store must be built anew.")
        for path in own_files(self.path):
            if path.relative_to(self.path).as_posix() not in self._journal.entries:
                with write_errors(path):
                    path.unlink()

    def _drain(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _raise_pending_error(self) -> None:
        if self._journal.closed:
            raise GradStoreError(f"{self.path}: this writer is closed. Open another with StoreWriter.resume.")
        if self._error is not None:
            self._drain()
            error, self._error = self._error, None
            self._accepted = {s for s in self._accepted if shard_file(s) in self._journal.entries}
            raise error


def _require_free(store: Path) -> None:
    if (store / _manifest.NAME).exists():
        raise StoreExists(f"{store}: holds a store already. Resume it, choose another path, or remove the folder.")
    if store.exists():
        if not store.is_dir():
            raise StoreExists(f"{store}: is a file. Choose a new folder for the store.")
        # what a writer leaves that dies before its manifest is there; anything else is not ours to write into
        ours = {"writer.lock", "shards", "data", _parts.FOLDER, _journal.NAME, OFFSETS}
        foreign = {p.name for p in store.iterdir() if p.name not in ours and p.suffix != TEMP_SUFFIX}
        known = set(own_files(store))
        for folder in ("shards", "data"):  # somebody's folder may be called "data", too
            foreign |= {f"{folder}/{p.name}" for p in store.glob(f"{folder}/*") if p not in known}
        if foreign:
            raise StoreExists(f"{store}: not empty ({min(foreign)!r} is in it). Choose a new folder for the store.")


def own_files(store: Path) -> list[Path]:
    """Shard, data and temporary files that a writer put into the folder; never anything of somebody else's."""
    temps = [store / f"{name}{TEMP_SUFFIX}" for name in (_manifest.NAME, _journal.NAME, OFFSETS)]
    found = [path for path in store.glob("*/*") if _OWN.fullmatch(path.relative_to(store).as_posix())]
    return [*found, *(path for path in temps if path.exists())]


def shard_file(shard: int) -> str:
    """Path inside the store of a shard."""
    return f"shards/{shard:05d}.safetensors"
