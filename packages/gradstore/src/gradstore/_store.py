"""`GradientStore`: a finished (or growing) store, read from the memory map, verified on first touch."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstore._data import OFFSETS, data_files, decode_offsets, decode_row
from gradstore._encodings import F32, Layout, Stored
from gradstore._errors import InvalidInput, StoreCorrupt, StoreIncomplete, did_you_mean
from gradstore._journal import read_journal
from gradstore._manifest import SIDE_DTYPES, load_manifest
from gradstore._scratch import Scratch
from gradstore._shard import map_file, read_ahead, shard_tensors
from gradstore._writer import shard_file

_MAPPED_FILES = 16  # kept open for row-wise access; a sweep keeps one


class Block:
    """Rows of one shard as they lie in the memory map, and the ways to float32."""

    __slots__ = ("_layout", "_tensors", "norm", "start", "stop")

    def __init__(self, start: int, tensors: Mapping[str, Stored], layout: Layout) -> None:
        self.start, self.stop = start, start + len(tensors["norm"])
        self._tensors, self._layout = tensors, layout
        self.norm: F32 = tensors["norm"].view(np.float32)  # [n], over all modules and bits

    def cut(self, start: int, stop: int) -> Block:
        """Rows `start` to `stop` (numbers of the store) of this block."""
        part = slice(start - self.start, stop - self.start)
        return Block(start, {name: self._tensors[name][part] for name in self._layout.shapes}, self._layout)

    def values(
        self, modules: Sequence[int] | None = None, bits: int | None = None, rows: NDArray[np.int64] | None = None
    ) -> F32:
        """float32 [n, d], of all rows or of those at the given places; a view where nothing needs doing."""
        picked = self._tensors if rows is None else {name: self._tensors[name][rows] for name in self._layout.shapes}
        return self._layout.decode(picked, modules, bits)

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """The encoded rows, over the memory map."""
        return self._tensors

    def products(self, queries: F32, modules: Sequence[int] | None, bits: int | None, scratch: Scratch) -> F32:
        """`values(modules, bits) @ queries`, float32 [n, q], but faster."""
        return self._layout.products(self._tensors, queries, modules, bits, scratch)


class GradientStore:
    """Read a store.

    Example:
        >>> store = GradientStore.open("runs/a")
        >>> store.block(0, 100, modules=["h.0.attn"]).shape
        (100, 256)
        >>> store.data(7)["text"]
        'Once upon a time …'

    Opening reads the manifest and the journal and touches no shard. The first touch of a file checks its checksum;
    `StoreCorrupt` names the file that changed. Reading needs no lock and is safe while a writer is at work
    (`partial=True`).
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        self.entries, _ = read_journal(self.path, self.manifest.journal)
        if not self.manifest.complete and not partial:
            done = len(self.shards)
            raise StoreIncomplete(
                f"{self.path}: the store is unfinished ({done} of {self.manifest.shards} shards). "
                "Resume the build, or open it with partial=True."
            )
        self.layout = Layout(self.manifest.dtype, self.manifest.columns)
        self.columns: Mapping[str, slice] = MappingProxyType(dict(zip(self.manifest.columns, self.layout.slices)))
        self._lock = Lock()  # searches of several threads may share a store
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> GradientStore:
        """Open a finished store, or with `partial=True` one that is still being written."""
        return cls(path, partial=partial)

    @property
    def rows(self) -> int:
        """Rows of the finished store."""
        return self.manifest.rows

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def width(self) -> int:
        """Floats per row over all modules."""
        return self.manifest.width

    @property
    def dtype(self) -> str:
        """How rows are encoded: fp32, fp16, bf16, int8, int4, int2 or int1."""
        return self.manifest.dtype

    @property
    def plan(self) -> Any:
        """The JSON that says how the rows were made."""
        return self.manifest.plan

    @property
    def meta(self) -> Any:
        """The JSON kept beside the plan."""
        return self.manifest.meta

    @property
    def complete(self) -> bool:
        """Whether the store is finished."""
        return self.manifest.complete

    @property
    def shards(self) -> list[tuple[int, int, int]]:
        """`(shard, start, stop)` of every shard that is there."""
        spans = ((shard, *self.manifest.span(shard)) for shard in range(self.manifest.shards))
        return [span for span in spans if shard_file(span[0]) in self.entries]

    def block(self, start: int, stop: int, modules: Sequence[str] | None = None) -> F32:
        """Rows `start` to `stop` as float32 [stop - start, d], of all modules or of those named, in the order named."""
        if not 0 <= start <= stop <= self.rows:
            raise InvalidInput(f"Rows {start}:{stop} are not in the store, which has {self.rows}.")
        chosen = self.select(modules)
        width = self.width if chosen is None else sum(self.layout.widths[m] for m in chosen)
        out = np.empty((stop - start, width), np.float32)
        per_shard = self.manifest.rows_per_shard
        for shard in range(start // per_shard, -(-stop // per_shard) if stop > start else 0):
            whole = self._shard_block(shard)
            part = whole.cut(max(start, whole.start), min(stop, whole.stop))
            out[part.start - start : part.stop - start] = part.values(chosen)
        return out

    def row(self, index: int) -> F32:
        """Row `index` as float32 [width]."""
        index = self._index(index)
        return self.block(index, index + 1)[0]

    def side(self, name: str) -> NDArray[Any]:
        """A whole side column, [rows] or [rows, w]; the first call verifies, and so reads, every shard."""
        if name not in self.manifest.side:
            known = list(self.manifest.side)
            raise InvalidInput(f"No side column {name!r}; the store has {known}.{did_you_mean(name, known)}")
        spec = self.manifest.side[name]
        shape = (self.rows,) if spec.width is None else (self.rows, spec.width)
        out = np.empty(shape, SIDE_DTYPES[spec.dtype])
        for shard in range(self.manifest.shards):
            start, stop = self.manifest.span(shard)
            out[start:stop] = self.tensors(shard)[name]
        return out

    def data(self, index: int) -> dict[str, Any]:
        """The dataset row behind row `index`, in a per-token store its document: one seek, however large the store."""
        return self.item(self.document(index)[0])

    def item(self, number: int) -> dict[str, Any]:
        """Dataset row `number`: a document in a per-token store, else the same as `data`."""
        if not self.manifest.data:
            raise InvalidInput(f"{self.path}: the store was built without its dataset (data=False).")
        if not 0 <= number < self.manifest.items:
            raise InvalidInput(f"Dataset row {number} is not in the store, which has {self.manifest.items}.")
        shard, offset = divmod(int(number), self.manifest.rows_per_shard)
        lines, offsets = (self._map(file) for file in data_files(shard))
        return decode_row(lines, offsets, offset)

    @property
    def offsets(self) -> NDArray[np.int64] | None:
        """In a per-token store int64 [documents + 1], document d has rows `offsets[d]` to `offsets[d + 1]`; or None."""
        return None if self.manifest.documents is None else decode_offsets(self._map(OFFSETS))

    def document(self, index: int) -> tuple[int, int]:
        """Document of row `index` and the row's place in it; `(index, 0)` where each row is a document."""
        index = self._index(index)
        if (offsets := self.offsets) is None:
            return index, 0
        document = int(np.searchsorted(offsets, index, side="right")) - 1  # the last to begin there: skips empty ones
        return document, index - int(offsets[document])

    def spans(self, rows: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Hits in a store of tokens as stretches of text: `(document, first token, one past its last)`.

        Example:
            >>> store.spans(hits.top_rows[0])
            [(4, 17, 20), (0, 3, 4)]

        Tokens next to each other in a document are one stretch; stretches stand in the order of their first hit.
        """
        places = [self.document(int(row)) for row in rows]
        found: dict[tuple[int, int], tuple[int, int, int]] = {}
        hit = set(places)
        for document, token in places:
            first, stop = token, token + 1
            while (document, first - 1) in hit:
                first -= 1
            while (document, stop) in hit:
                stop += 1
            found.setdefault((document, first), (document, first, stop))
        return list(found.values())

    def sweep(self) -> Iterator[Block]:
        """Every shard that is there, in order, as one block each; one is mapped at a time, so memory stays flat."""
        shards = [shard for shard, _, _ in self.shards]
        for shard, following in zip(shards, [*shards[1:], None]):
            if following is not None:
                read_ahead(self.path / shard_file(following))
            yield self._shard_block(shard, keep=False)

    def shard(self, number: int) -> Block:
        """The rows of one shard as they lie in the memory map, which goes when the block does."""
        return self._shard_block(number, keep=False)

    def select(self, modules: Sequence[str] | None) -> list[int] | None:
        """Positions of the named modules; None means all."""
        if modules is None:
            return None
        if isinstance(modules, str) or not modules:
            raise InvalidInput(f"modules must be a list of names or None, not {modules!r}.")
        for name in modules:
            if name not in self.columns:
                raise InvalidInput(
                    f"No module {name!r} in the store; it has {len(self.columns)}.{did_you_mean(name, self.columns)}"
                )
        order = {name: position for position, name in enumerate(self.columns)}
        return [order[name] for name in modules]

    def _index(self, index: int) -> int:
        if not 0 <= index < self.rows:
            raise InvalidInput(f"Row {index} is not in the store, which has {self.rows}.")
        return int(index)

    def _shard_block(self, shard: int, *, keep: bool = True) -> Block:
        return Block(self.manifest.span(shard)[0], self.tensors(shard, keep=keep), self.layout)

    def tensors(self, shard: int, *, keep: bool = True) -> dict[str, NDArray[np.generic]]:
        """A shard's tensors as they lie in its file, over the memory map."""
        file = shard_file(shard)
        tensors = shard_tensors(self._map(file, keep=keep), self.path / file)
        start, stop = self.manifest.span(shard)
        for name, shape in self.layout.shapes.items():
            if name not in tensors or tensors[name].shape != (stop - start, *shape):
                raise StoreCorrupt(f"{self.path / file}: does not hold the {self.dtype} rows {start}..{stop - 1}.")
        return tensors

    def _map(self, file: str, *, keep: bool = True) -> mmap.mmap:
        with self._lock:
            if file in self._maps:
                self._maps.move_to_end(file)
                return self._maps[file]
        if file not in self.entries:
            raise StoreIncomplete(f"{self.path / file}: not written yet. Resume the build.")
        view = map_file(self.path, self.entries[file], verify=file not in self._verified)
        self._verified.add(file)
        if keep:
            with self._lock:
                self._maps[file] = view
                while len(self._maps) > _MAPPED_FILES:
                    self._maps.popitem(last=False)  # unmapped once no array refers to it
        return view
