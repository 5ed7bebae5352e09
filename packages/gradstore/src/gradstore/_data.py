"""The dataset rows beside the gradients: JSON lines cut like the shards; offsets make a hit one seek away."""

from __future__ import annotations

import io
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gradstore._errors import InvalidInput

OFFSETS: Final = "offsets.npy"


def data_files(shard: int) -> tuple[str, str]:
    """Paths inside the store of a data shard's lines and offsets."""
    return f"data/{shard:05d}.jsonl", f"data/{shard:05d}.offsets.npy"


def encode_rows(rows: Iterable[Mapping[str, Any]], per_shard: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Count, lines and offsets (`.npy`, int64 [n + 1], byte positions) of one data shard after the other."""
    lines: list[bytes] = []
    for number, row in enumerate(rows):
        lines.append(_line(row, number))
        if len(lines) == per_shard:
            yield _pack(lines)
            lines = []
    if lines:
        yield _pack(lines)


def encode_offsets(offsets: NDArray[np.int64]) -> bytes:
    """A `.npy` file, version 1.0, of little-endian int64."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(offsets, "<i8"), version=(1, 0))
    return stream.getvalue()


def decode_offsets(file: mmap.mmap) -> NDArray[np.int64]:
    """All of an offsets file, over the memory map."""
    count = count_rows(file) + 1
    return np.frombuffer(file, "<i8", count=count, offset=len(file) - 8 * count)


def check_offsets(offsets: NDArray[Any], rows: int) -> NDArray[np.int64]:
    """Offsets of documents as int64, or the reason why they are none."""
    given = np.asarray(offsets)
    if given.ndim != 1 or given.dtype.kind not in "iu" or not len(given):
        raise InvalidInput(f"offsets must be integers [documents + 1], not {given.dtype} of shape {given.shape}.")
    exact = given.astype(np.int64)
    if exact[0] != 0 or exact[-1] != rows or (np.diff(exact) < 0).any():
        raise InvalidInput(
            f"offsets must rise from 0 to the number of rows, {rows}; these go from {exact[0]} to {exact[-1]}. "
            "Document d has rows offsets[d] to offsets[d + 1]."
        )
    return exact


def decode_row(lines: mmap.mmap, offsets: mmap.mmap, index: int) -> dict[str, Any]:
    """Row `index` of a data shard."""
    header = len(offsets) - 8 * (count_rows(offsets) + 1)
    start, stop = np.frombuffer(offsets, "<i8", count=2, offset=header + 8 * index)
    return json.loads(lines[int(start) : int(stop)])


def count_rows(offsets: mmap.mmap) -> int:
    """Rows of a data shard, from its offsets file."""
    stream = io.BytesIO(offsets[:1024])
    np.lib.format.read_magic(stream)
    (count,), _, _ = np.lib.format.read_array_header_1_0(stream)
    return count - 1


def _line(row: Mapping[str, Any], number: int) -> bytes:
    try:
        text = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        bad = next((name for name, value in row.items() if not _is_json(value)), "?")
        raise InvalidInput(
            f"Data row {number}, column {bad!r} can't be stored as JSON ({error}). Drop the column or convert it."
        ) from error
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # lone surrogates: escaped they survive, as UTF-8 they don't
        return json.dumps(dict(row)).encode() + b"\n"


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _pack(lines: list[bytes]) -> tuple[int, bytes, bytes]:
    offsets = np.zeros(len(lines) + 1, "<i8")
    np.cumsum([len(line) for line in lines], out=offsets[1:])
    return len(lines), b"".join(lines), encode_offsets(offsets)
