"""How a float32 row becomes bytes and comes back.

fp32 and bf16 keep the row as it is. fp16 stores `row / scale` with one power of two per row, chosen so that the
largest entry lies in [2^14, 2^15): scaling by a power of two is exact, and neither tiny nor huge gradients leave the
format's range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array with the dtype name that safetensors gives it (NumPy has no bfloat16, so its bits travel as uint16)."""

    dtype: str
    array: NDArray[np.generic]


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
    """Bytes that one encoded row takes."""
    encoding = ENCODINGS[dtype]
    return np.dtype(encoding.carrier).itemsize * width + 4 * encoding.scaled


def tensor_names(dtype: str) -> set[str]:
    """Names of the tensors that carry the rows."""
    return {"rows", "scale"} if ENCODINGS[dtype].scaled else {"rows"}


def encode(rows: F32, dtype: str) -> dict[str, Tensor]:
    """float32 [n, D] → the tensors of a shard that carry it."""
    if dtype == "fp32":
        return {"rows": Tensor("F32", np.ascontiguousarray(rows, "<f4"))}
    if dtype == "bf16":
        return {"rows": Tensor("BF16", _to_bfloat16(rows))}
    scale = _fp16_scale(rows)
    return {
        "rows": Tensor("F16", (rows * (1 / scale)[:, None]).astype("<f2")),
        "scale": Tensor("F32", scale),
    }


def decode(stored: NDArray[np.generic], dtype: str) -> F32:
    """The carrier array [n, d] → float32 [n, d], not yet multiplied by the row's scale; fp32 stays a view."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def _to_bfloat16(rows: F32) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(rows, "<f4").view(np.uint32)
    nearest_even = bits + (0x7FFF + ((bits >> 16) & 1))  # ties go to the even mantissa, as hardware does
    rounded = (nearest_even >> 16).astype(np.uint16)
    rounded[np.isnan(rows)] = 0x7FC0  # the carry could turn a NaN into 0; keep it a NaN for the finite check
    return rounded


def _fp16_scale(rows: F32) -> F32:
    largest = np.max(np.abs(rows), axis=1, initial=0)
    exponent = np.frexp(largest)[1] - 15
    exponent[(largest == 0) | ~np.isfinite(largest)] = 0
    # 2^±100 keeps both the scale and its inverse normal float32 numbers
    return np.ldexp(np.float32(1), np.clip(exponent, -100, 113)).astype(np.float32)
