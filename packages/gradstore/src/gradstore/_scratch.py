"""Memory that a thread uses again for the next block.

A decoded block is megabytes large. Taken from the allocator and given back each time it costs a page fault per 4 KiB,
in a pool thread a quarter of the whole search.
"""

from __future__ import annotations

from math import prod
from threading import local
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Scratch(local):
    """Named buffers, one set per thread; an array is good until its name is asked for again in that thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised array over the buffer of that name, which grows as needed."""
        size = prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            buffer = self._buffers[name] = np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)
