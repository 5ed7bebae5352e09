"""A shard file: valid safetensors whose data section starts on a page, tensors ordered so that each is aligned."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gradstore._encodings import Tensor
from gradstore._errors import StoreCorrupt
from gradstore._files import Buffer, checksum, read_errors
from gradstore._journal import Entry

PAGE: Final = 4096
CARRIERS: Final = {
    "F64": "<f8",
    "I64": "<i8",
    "F32": "<f4",
    "I32": "<i4",
    "F16": "<f2",
    "BF16": "<u2",
    "U8": "|u1",
    "I8": "|i1",
}


def shard_parts(tensors: Mapping[str, Tensor]) -> Iterator[Buffer]:
    """The bytes of a shard: an 8-byte little-endian header length, the JSON header padded to a page, the tensors.

    Wider dtypes come first: then every tensor starts on a multiple of its item size without holes, which safetensors
    forbids and torch needs.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].array.itemsize, item[0] != "rows", item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "gradstore"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.array.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.array.nbytes:
            yield np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).data


def map_file(store: Path, entry: Entry, *, verify: bool) -> mmap.mmap:
    """Map a journalled file read-only; checks its size always, its checksum when asked."""
    path = store / entry.file
    try:
        with read_errors(path), open(path, "rb") as file:
            size = file.seek(0, 2)
            if size != entry.bytes:
                raise StoreCorrupt(
                    f"{path}: {size} bytes on disk, {entry.bytes} in the journal; the file was cut or overwritten. "
                    "Restore it from a copy, or run repair and resume."
                )
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise StoreCorrupt(
            f"{path}: missing, though the journal says it was written. Restore it, or run repair and resume."
        ) from None
    if verify and (found := checksum(memoryview(view))) != entry.checksum:
        raise StoreCorrupt(
            f"{path}: checksum {found}, the journal says {entry.checksum}; bytes changed after they were written. "
            "Restore it from a copy, or run repair and resume."
        )
    return view


def read_ahead(path: Path) -> None:
    """Ask the kernel to fetch a file while the one before it is worked on; its own turn tells what is wrong with it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def shard_tensors(view: mmap.mmap, path: Path) -> dict[str, NDArray[np.generic]]:
    """The tensors of a mapped shard as arrays over the map, nothing copied."""
    try:
        length = int.from_bytes(view[:8], "little")
        header: dict[str, dict[str, list[int]]] = json.loads(view[8 : 8 + length])
        return {
            name: np.frombuffer(
                view,
                CARRIERS[str(spec["dtype"])],
                count=int(np.prod(spec["shape"], dtype=np.int64)),
                offset=8 + length + spec["data_offsets"][0],
            ).reshape(spec["shape"])
            for name, spec in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError) as error:
        raise StoreCorrupt(f"{path}: not a shard of this format ({error}).") from error
