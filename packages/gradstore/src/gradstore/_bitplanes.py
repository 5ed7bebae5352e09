"""Rows in 1, 2, 4 or 8 bits a float, one plane per bit, so that a coarser read is a prefix of the planes.

A float x of module g becomes the code c = floor(x / step) + 2^(b-1), clipped to b bits, and reads back as
(c - (2^b - 1) / 2) * scale[g]: a uniform mid-rise quantiser. It is linear in its bits, which is what makes a byte of
two planes one table look-up of eight floats. The step is the one that loses least on Gaussian values of the module's
root mean square (Max 1960, table II), as the coordinates of a sketch nearly are; 8 bits reach the largest value
instead. The scale is then the least-squares one for the codes found.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gradstore._scratch import Scratch

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

BITS: Final = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}
_GAUSSIAN_STEP: Final = {1: 1.0, 2: 0.9957, 4: 0.3352}  # one bit is a sign, whatever the step


def padded(width: int) -> int:
    """Columns that a module takes in a plane: whole bytes, so that a module is a byte range."""
    return -(-width // 8) * 8


def quantise(values: F32, bits: int) -> tuple[list[U8], F32]:
    """One module's float32 [n, d] → planes [n, padded(d) / 8], most significant first, and scales [n].

    Non-finite input gives a non-finite scale.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.max(np.abs(values), axis=1, initial=0)
        # a power of two per row brings every magnitude to about 1: exact, and float32 then suffices for the rest
        exponent = np.where(np.isfinite(largest), np.frexp(largest)[1], 0).clip(-126, 126)
        unit: F32 = values * np.ldexp(np.float32(1), -exponent).astype(np.float32)[:, None]
        if bits == 8:
            step = np.max(np.abs(unit), axis=1, initial=0) / np.float32(127.5)
        else:
            step = _GAUSSIAN_STEP[bits] * np.sqrt(_row_sums(unit * unit) / max(values.shape[1], 1))
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0).astype(np.float32)
        half = 1 << (bits - 1)
        codes = np.floor(unit * inverse[:, None])
        np.clip(codes, -half, half - 1, out=codes)
        codes[~np.isfinite(largest)] = 0
        unsigned = (codes + np.float32(half)).astype(np.uint8)
        codes += np.float32(0.5)
        energy = _row_sums(codes * codes)
        codes *= unit
        scale = np.divide(_row_sums(codes), energy, out=np.zeros_like(energy), where=step > 0)
        scale[~np.isfinite(largest)] = np.nan
        planes = [np.packbits(unsigned & np.uint8(half >> plane), axis=1) for plane in range(bits)]
        return planes, np.ldexp(scale, exponent).astype(np.float32)


def _row_sums(values: F32) -> NDArray[np.float64]:
    """In float64, so that no bit of a scale depends on the machine's vector width."""
    return values.sum(axis=1, dtype=np.float64)


def dequantise(planes: list[U8], bits: int, scratch: Scratch | None = None) -> F32:
    """The first planes of a b-bit module [n, bytes] → float32 [n, 8 * bytes] in units of its scale.

    With fewer planes than bits the values are those of the cell centres of the coarser quantiser. With `scratch` the
    result lies in its memory, to be used before the next call.
    """
    scratch = scratch or Scratch()
    values = _look_up(planes[:2], scratch, "values")
    for first in range(2, len(planes), 2):
        values *= 4
        values += _look_up(planes[first : first + 2], scratch, "low")
    if len(planes) < bits:
        values *= np.float32(1 << (bits - len(planes)))
    return values


def _look_up(planes: list[U8], scratch: Scratch, name: str) -> F32:
    rows, width = planes[0].shape
    index = scratch.array("index", planes[0].shape, np.intp)
    np.copyto(index, planes[0])
    for plane in planes[1:]:
        index <<= 8
        index |= plane
    out = scratch.array(name, (rows, 8 * width), np.float32)
    # an item of 32 opaque bytes is eight floats: NumPy moves it in one go; "clip" spares the bounds check
    np.take(_table(len(planes)), index.reshape(-1), out=out.reshape(-1).view("V32"), mode="clip")
    return out


@lru_cache(maxsize=2)
def _table(planes: int) -> NDArray[np.void]:
    """Eight centred codes for every byte of one plane (256 entries) or of two (65,536 entries, high plane first)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32)
    entries = bits - np.float32(0.5)
    if planes == 2:
        entries = (2 * bits[:, None, :] + bits[None, :, :] - np.float32(1.5)).reshape(-1, 8)
    return np.ascontiguousarray(entries).reshape(-1).view("V32")
