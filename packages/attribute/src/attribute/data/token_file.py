"""Token ids of a whole dataset in one memory-mapped folder: written once, then sliced for nothing.

``ids.bin`` (uint16 or uint32), ``labelled.bin`` (uint8) and ``offsets.bin`` (int64, rows + 1), little-endian, and
``tokens.json``, written last, so that a folder without it is an unfinished one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from attribute._errors import DataError
from attribute.data.tokenise import Row

_META = "tokens.json"
_FLUSH_TOKENS = 1 << 20


class TokenFile:
    """Rows of token ids and label masks, read from the memory map."""

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder} holds no finished token file") from None
        self._digest = meta["digest"]
        self.weights: np.ndarray | None = None
        self._left_out: np.ndarray | None = None
        self.offsets = np.fromfile(folder / "offsets.bin", dtype="<i8")
        total = int(self.offsets[-1])
        self._ids = _map(folder / "ids.bin", meta["dtype"], total)
        self._labelled = _map(folder / "labelled.bin", "u1", total)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row ``[rows]``."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """Hash of every id, label and offset: the very data a run was made from."""
        return self._digest

    def weigh(self, weights: np.ndarray | None) -> None:
        """Weights ``[rows]`` of the rows' losses, which become part of the digest.

        A row of weight 0 is a row like any other, whose gradient is zero; one of weight NaN is left out: none of its
        tokens carries loss.
        """
        if weights is not None:
            given = np.ascontiguousarray(weights, dtype=np.float32)
            self.weights, self._left_out = np.nan_to_num(given), np.isnan(given)
            self._digest = hashlib.sha256(self._digest.encode() + given.tobytes()).hexdigest()

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    def ids(self, row: int) -> np.ndarray:
        """Token ids of one row ``[s]``."""
        return self._ids[self.offsets[row] : self.offsets[row + 1]]

    def labelled(self, row: int) -> np.ndarray:
        """Which tokens of one row carry loss ``[s]``, 0 or 1."""
        found = self._labelled[self.offsets[row] : self.offsets[row + 1]]
        return found if self._left_out is None or not self._left_out[row] else np.zeros_like(found)


class TokenFileWriter:
    """Streams rows into a new token folder; memory does not grow with the dataset."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder = folder
        self._vocabulary = vocabulary
        self._dtype = "<u2" if vocabulary <= 1 << 16 else "<u4"

    def write(self, rows: Iterable[Row]) -> TokenFile:
        """Write all rows.

        Raises:
            DataError: a token id outside the vocabulary.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lengths: list[int] = []
        with self._created("ids.bin") as ids, self._created("labelled.bin") as labelled:
            pending: list[Row] = []
            size = 0
            for row in rows:
                self._check(len(lengths), row.ids)
                lengths.append(len(row.ids))
                pending.append(row)
                size += len(row.ids)
                if size > _FLUSH_TOKENS:
                    self._flush(pending, ids, labelled)
                    pending, size = [], 0
            self._flush(pending, ids, labelled)
        with self._created("offsets.bin") as offsets:
            self._append(offsets, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype("<i8"))
        digest = hashlib.sha256()
        for name in ("ids.bin", "labelled.bin", "offsets.bin"):
            with (self.folder / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        meta = {"dtype": self._dtype, "rows": len(lengths), "digest": digest.hexdigest()}
        with self._created(_META) as stream:
            self._append(stream, np.frombuffer(json.dumps(meta).encode(), dtype="u1"))
        return TokenFile(self.folder)

    def _check(self, number: int, ids: np.ndarray) -> None:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocabulary:
            outside = ids[(ids < 0) | (ids >= self._vocabulary)][0]
            raise DataError(
                f"row {number} has token id {outside}, the model knows {self._vocabulary}: "
                "is this the model's own tokenizer? (--tokenizer)"
            )

    def _flush(self, rows: list[Row], ids: io.FileIO, labelled: io.FileIO) -> None:
        if rows:
            self._append(ids, np.concatenate([row.ids for row in rows]).astype(self._dtype))
            self._append(labelled, np.concatenate([row.labelled for row in rows]).astype("u1"))

    def _created(self, name: str) -> io.FileIO:
        return (self.folder / name).open("wb", buffering=0)

    def _append(self, stream: io.FileIO, array: np.ndarray) -> None:
        left = memoryview(array.tobytes())
        try:
            while len(left):  # a raw write may be short
                left = left[stream.write(left) :]
        except OSError as error:
            raise DataError(f"{stream.name}: the tokens cannot be written ({error.strerror or error})") from error


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype=dtype)
