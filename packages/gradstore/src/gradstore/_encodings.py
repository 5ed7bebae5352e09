"""How a float32 row becomes bytes and comes back.

fp32 and bf16 keep the row as it is. fp16 stores `row / scale` with one power of two per row, chosen so that the
largest entry lies in [2^14, 2^15): scaling by a power of two is exact, and neither tiny nor huge gradients leave the
format's range. Beside every encoding stands `norm`, the Euclidean norm of the row as it was stored: cosines need it,
and it bounds what a float32 sum can be off by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Stored = NDArray[np.generic]

_CHUNK: Final = 256  # rows decoded at a time, so that temporaries stay in cache


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array with the dtype name that safetensors gives it (NumPy has no bfloat16, so its bits travel as uint16)."""

    dtype: str
    array: Stored


@dataclass(frozen=True, slots=True)
class Encoding:
    """The safetensors dtype of `rows`, its NumPy carrier, and whether a `scale` per row stands beside it."""

    dtype: str
    carrier: str
    scaled: bool


ENCODINGS: Final[Mapping[str, Encoding]] = {
    "fp32": Encoding("F32", "<f4", scaled=False),
    "fp16": Encoding("F16", "<f2", scaled=True),
    "bf16": Encoding("BF16", "<u2", scaled=False),
}


def row_bytes(dtype: str, width: int) -> int:
    """Bytes that one encoded row takes, its scale and norm included."""
    encoding = ENCODINGS[dtype]
    return np.dtype(encoding.carrier).itemsize * width + 4 * encoding.scaled + 4


def tensor_names(dtype: str) -> set[str]:
    """Names of the tensors that carry the rows."""
    return {"rows", "scale", "norm"} if ENCODINGS[dtype].scaled else {"rows", "norm"}


def encode(rows: F32, dtype: str) -> dict[str, Tensor]:
    """float32 [n, D] → the tensors of a shard that carry it; non-finite input gives a non-finite norm."""
    if dtype == "fp16":
        largest = np.max(np.abs(rows), axis=1, initial=0)
        scale = _fp16_scale(largest)
        halves = (rows * (1 / scale)[:, None]).astype("<f2")
        norm = np.where(np.isfinite(largest), _norms(halves, dtype) * scale, np.float32(np.nan))
        return {"rows": Tensor("F16", halves), "scale": Tensor("F32", scale), "norm": Tensor("F32", norm)}
    stored = _to_bfloat16(rows) if dtype == "bf16" else np.ascontiguousarray(rows, "<f4")
    return {"rows": Tensor(ENCODINGS[dtype].dtype, stored), "norm": Tensor("F32", _norms(stored, dtype))}


def decode(stored: Stored, dtype: str) -> F32:
    """The carrier array [n, d] → float32 [n, d], not yet multiplied by the row's scale; fp32 stays a view."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "fp16":
        return _from_float16(stored)
    return stored.astype(np.float32, copy=False)


def is_finite(stored: Stored, dtype: str) -> NDArray[np.bool_]:
    """Which encoded entries are finite; asked of the stored bits, as decoding need not keep an infinity."""
    if dtype == "bf16":
        return (stored.view(np.uint16) & 0x7F80) != 0x7F80
    return np.isfinite(stored)


def _from_float16(stored: Stored) -> F32:
    """Exact for every finite half, four times as fast as NumPy's own cast, which is scalar.

    Sign-extend to 32 bits and shift the exponent and mantissa into place: read as float32 that is the value times
    2^-112, the difference of the two exponent biases.
    """
    bits = stored.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # 0x8fffe000: sign, five exponent bits, ten mantissa bits
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _to_bfloat16(rows: F32) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(rows, "<f4").view(np.uint32)
    nearest_even = bits + (0x7FFF + ((bits >> 16) & 1))  # ties go to the even mantissa, as hardware does
    rounded = (nearest_even >> 16).astype(np.uint16)
    rounded[np.isnan(rows)] = 0x7FC0  # the carry could turn a NaN into 0; keep it a NaN for the finite check
    return rounded


def _fp16_scale(largest: F32) -> F32:
    exponent = np.frexp(largest)[1] - 15
    exponent[(largest == 0) | ~np.isfinite(largest)] = 0
    # 2^±100 keeps both the scale and its inverse normal float32 numbers
    return np.ldexp(np.float32(1), np.clip(exponent, -100, 113)).astype(np.float32)


def _norms(stored: Stored, dtype: str) -> F32:
    """Norms of encoded rows without scale, summed in float64: the same bytes whatever the machine's vector width."""
    norms = np.empty(len(stored), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(stored), _CHUNK):
            values = decode(stored[start : start + _CHUNK], dtype).astype(np.float64)
            norms[start : start + _CHUNK] = np.sqrt(np.multiply(values, values, out=values).sum(axis=1))
    return norms
