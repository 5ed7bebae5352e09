"""How float32 rows become the tensors of a shard and come back.

fp32 and bf16 keep the row as it is. fp16 stores `row / scale` with one power of two per row, chosen so that the
largest entry lies in [2^14, 2^15): scaling by a power of two is exact, and neither tiny nor huge gradients leave the
format's range. int8 to int1 are bit planes with a scale per row and module. Beside every encoding stands `norm`, the
Euclidean norm of the row as it is read back: cosines need it, and it bounds what a float32 sum can be off by.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gradstore._bitplanes import BITS, dequantise, padded, quantise
from gradstore._scratch import Scratch

F32 = NDArray[np.float32]
Stored = NDArray[np.generic]

DTYPES: Final = ("fp32", "fp16", "bf16", *BITS)
_FLOATS: Final[Mapping[str, tuple[str, int]]] = {"fp32": ("F32", 4), "fp16": ("F16", 2), "bf16": ("BF16", 2)}
_CHUNK: Final = 1 << 17  # floats encoded at a time, so that temporaries stay in cache


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array with the dtype name that safetensors gives it (NumPy has no bfloat16, so its bits travel as uint16)."""

    dtype: str
    array: Stored


class Layout:
    """How rows of given modules lie in the tensors of a given dtype."""

    def __init__(self, dtype: str, columns: Mapping[str, int]) -> None:
        self.dtype = dtype
        self.bits = BITS.get(dtype)
        self.widths = list(columns.values())
        self.width = sum(self.widths)
        self._bytes = np.cumsum([0, *(padded(width) // 8 for width in self.widths)]).tolist()
        starts = np.cumsum([0, *self.widths]).tolist()
        self.slices = [slice(a, b) for a, b in pairwise(starts)]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes, scales and norm included."""
        if self.bits is not None:
            return self.bits * self._bytes[-1] + 4 * len(self.widths) + 4
        return _FLOATS[self.dtype][1] * self.width + (8 if self.dtype == "fp16" else 4)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape without the leading row count of each tensor that carries the rows."""
        if self.bits is not None:
            planes = {f"plane{p}": (self._bytes[-1],) for p in range(self.bits)}
            return {**planes, "scale": (len(self.widths),), "norm": ()}
        scale: dict[str, tuple[int, ...]] = {"scale": ()} if self.dtype == "fp16" else {}
        return {"rows": (self.width,), **scale, "norm": ()}

    def encode(self, rows: F32) -> dict[str, Tensor]:
        """float32 [n, D] → the tensors that carry it; a row that is not finite, as stored, has a norm that is not."""
        together = _CHUNK if self.bits is None else 8 * _CHUNK  # planes are made module by module
        step = max(8, together // max(self.width, 1))
        chunks = [self._encode(rows[start : start + step]) for start in range(0, max(len(rows), 1), step)]
        return {
            name: Tensor(chunks[0][name].dtype, np.concatenate([chunk[name].array for chunk in chunks]))
            for name in self.shapes
        }

    def decode(
        self, tensors: Mapping[str, Stored], modules: Sequence[int] | None = None, bits: int | None = None
    ) -> F32:
        """float32 [n, d] of all modules or of those given, from the first `bits` planes; fp32 stays a view."""
        if self.bits is None:
            values = self._decode_floats(tensors, modules)
            return values if self.dtype != "fp16" else values * tensors["scale"].view(np.float32)[:, None]
        chosen = list(range(len(self.widths)) if modules is None else modules)
        values, scale = self._decode_planes(tensors, chosen, bits or self.bits)
        parts = [values[:, start : start + self.widths[m]] for m, start in zip(chosen, self._padded_starts(chosen))]
        scaled = [part * scale[:, column, None] for column, part in enumerate(parts)]
        return np.concatenate([np.empty((len(values), 0), np.float32), *scaled], axis=1)

    def products(
        self,
        tensors: Mapping[str, Stored],
        queries: F32,
        modules: Sequence[int] | None,
        bits: int | None,
        scratch: Scratch,
    ) -> F32:
        """`decode(…) @ queries`, float32 [n, q], with scales applied to the products instead of the rows."""
        if self.bits is None:
            result = self._decode_floats(tensors, modules, scratch) @ queries
            return result if self.dtype != "fp16" else result * tensors["scale"].view(np.float32)[:, None]
        chosen = list(range(len(self.widths)) if modules is None else modules)
        values, scale = self._decode_planes(tensors, chosen, bits or self.bits, scratch)
        result = np.zeros((len(values), queries.shape[1]), np.float32)
        row = 0
        for column, (module, start) in enumerate(zip(chosen, self._padded_starts(chosen))):
            width = self.widths[module]
            part = values[:, start : start + width] @ queries[row : row + width]
            part *= scale[:, column, None]
            result += part
            row += width
        return result

    def _encode(self, rows: F32) -> dict[str, Tensor]:
        if self.bits is not None:
            return self._encode_planes(rows, self.bits)
        dtype = _FLOATS[self.dtype][0]
        if self.dtype == "fp16":
            largest: F32 = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))
            scale = _fp16_scale(largest)
            halves = _to_float16(rows * np.reciprocal(scale)[:, None])
            norm = np.where(np.isfinite(largest), _norms(_decode_floats(halves, "fp16")) * scale, np.float32(np.nan))
            return {"rows": Tensor(dtype, halves), "scale": Tensor("F32", scale), "norm": Tensor("F32", norm)}
        stored = _to_bfloat16(rows) if self.dtype == "bf16" else np.ascontiguousarray(rows, "<f4")
        return {"rows": Tensor(dtype, stored), "norm": Tensor("F32", _norms(_decode_floats(stored, self.dtype)))}

    def _encode_planes(self, rows: F32, bits: int) -> dict[str, Tensor]:
        modules = [quantise(rows[:, columns], bits) for columns in self.slices]
        empty = np.empty((len(rows), 0), np.uint8)
        planes = [np.concatenate([empty, *(module[0][p] for module in modules)], axis=1) for p in range(bits)]
        scale = np.stack([module[1] for module in modules], axis=1) if modules else empty.astype(np.float32)
        tensors = {f"plane{p}": Tensor("U8", plane) for p, plane in enumerate(planes)}
        tensors["scale"] = Tensor("F32", scale)
        values = self.decode({name: tensor.array for name, tensor in tensors.items()})
        return {**tensors, "norm": Tensor("F32", _norms(values))}

    def _decode_floats(
        self, tensors: Mapping[str, Stored], modules: Sequence[int] | None, scratch: Scratch | None = None
    ) -> F32:
        rows = tensors["rows"]
        if modules is None:
            return _decode_floats(rows, self.dtype, scratch)
        parts = [_decode_floats(rows[:, self.slices[module]], self.dtype) for module in modules]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _decode_planes(
        self, tensors: Mapping[str, Stored], modules: Sequence[int], read: int, scratch: Scratch | None = None
    ) -> tuple[F32, F32]:
        """Values [n, padded d] in units of the scale, and the scale [n, modules]."""
        planes = [tensors[f"plane{p}"].view(np.uint8) for p in range(read)]
        scale = tensors["scale"].view(np.float32)
        if len(modules) < len(self.widths) or list(modules) != list(range(len(self.widths))):
            ranges = [self.plane_bytes(m) for m in modules]
            planes = [np.concatenate([plane[:, part] for part in ranges], axis=1) for plane in planes]
            scale = scale[:, list(modules)]
        return dequantise(planes, self.bits or read, scratch), scale

    def plane_bytes(self, module: int) -> slice:
        """Where a module stands in each plane."""
        return slice(self._bytes[module], self._bytes[module + 1])

    def _padded_starts(self, modules: Sequence[int]) -> list[int]:
        return np.cumsum([0, *(padded(self.widths[m]) for m in modules)]).tolist()[:-1]


def is_finite(stored: Stored) -> NDArray[np.bool_]:
    """Which encoded entries are finite; asked of the stored bits, as decoding need not keep an infinity."""
    if stored.dtype == np.uint16:
        return (stored.view(np.uint16) & 0x7F80) != 0x7F80
    return np.isfinite(stored)


def _decode_floats(stored: Stored, dtype: str, scratch: Scratch | None = None) -> F32:
    if dtype == "bf16":
        bits = _integers(stored.view(np.uint16), np.uint32, scratch)
        bits <<= 16
        return bits.view(np.float32)
    if dtype == "fp16":
        return _from_float16(_integers(stored.view(np.int16), np.int32, scratch))
    return stored.astype(np.float32, copy=False)


def _integers(stored: NDArray[Any], dtype: DTypeLike, scratch: Scratch | None) -> NDArray[Any]:
    out = (scratch or Scratch()).array("values", stored.shape, dtype)
    np.copyto(out, stored)
    return out


def _from_float16(bits: NDArray[np.int32]) -> F32:
    """Exact for every finite half, four times as fast as NumPy's own cast, which is scalar.

    `bits` are the halves, sign-extended to 32 bits, and are overwritten. Shift exponent and mantissa into place: read
    as float32 that is the value times 2^-112, the difference of the two exponent biases.
    """
    bits <<= 13
    bits &= np.int32(-0x70002000)  # 0x8fffe000: sign, five exponent bits, ten mantissa bits
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _to_float16(rows: F32) -> NDArray[np.float16]:
    """To the nearest, ties to even; where torch is loaded by torch, which gives the same bits fifteen times as fast."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "from_numpy"):
        return rows.astype("<f2")
    return torch.from_numpy(rows).half().numpy()


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


def _norms(values: F32) -> F32:
    """Summed in float64: the same bytes whatever the machine's vector width."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact = values.astype(np.float64)
        return np.sqrt(np.multiply(exact, exact, out=exact).sum(axis=1)).astype(np.float32)
