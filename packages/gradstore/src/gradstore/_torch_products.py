"""Rows times queries by torch, where the process has imported it: vectorised conversions, and int8 GEMMs on planes.

Used as the filter of a search only, so it may round as long as it says how much. Floats go through float32 in blocks
that stay in the second-level cache. Planes become int8 codes by table look-up; each query becomes two int8 vectors,
q ≈ step (high + low / 254), and one int8 GEMM per module gives all products exactly in int32. What is lost is
q minus that, about 4e-5 of its norm.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gradstore._encodings import F32, Layout, Stored
from gradstore._scratch import Scratch

F64 = NDArray[np.float64]

_CACHE_BYTES: Final = 1 << 20
_CHUNK: Final = 1 << 15  # columns of a GEMM: 2^15 products of 2^14 fit int32 twice over, and 16 rows the cache


def loaded_torch() -> Any:
    """The torch module, if the process has it already and it computes float32 products in float32; else None."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_float32_matmul_precision"):
        return None
    try:
        return torch if torch.get_float32_matmul_precision() == "highest" else None
    except RuntimeError:  # set by two APIs at once, of which only one is asked here
        return None


def has_int8_gemm(torch: Any) -> bool:
    """Whether int8 GEMMs run on the processor's own instructions; without them torch falls back to plain loops."""
    supported = getattr(getattr(torch, "cpu", None), "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and supported is not None and bool(supported())


class FloatProducts:
    """Products with fp32, fp16 and bf16 rows."""

    def __init__(self, torch: Any, layout: Layout, queries: F32, modules: Sequence[int] | None) -> None:
        """`queries` [d, q] over the chosen modules."""
        self._torch = torch
        self.error: F64 = np.zeros(queries.shape[1])
        self.step = max(64, (16 << 20) // (4 * max(layout.width, 1)))
        self._dtype = layout.dtype
        slices = [slice(0, layout.width)] if modules is None else [layout.slices[module] for module in modules]
        starts = np.cumsum([0, *(part.stop - part.start for part in slices)]).tolist()
        whole = torch.from_numpy(queries)
        self._parts = [
            (slice(part.start + first, part.start + last), whole[a + first : a + last].contiguous())
            for part, (a, b) in zip(slices, pairwise(starts))
            for first, last in pairwise([*range(0, b - a, _CHUNK), b - a])
        ]
        self._scratch = Scratch()

    def __call__(self, tensors: Mapping[str, Stored]) -> F32:
        """float32 [n, q]."""
        torch = self._torch
        rows = _tensor(torch, tensors["rows"])
        if self._dtype == "bf16":
            rows = rows.view(torch.bfloat16)
        out = np.zeros((len(rows), len(self.error)), np.float32)
        result = torch.from_numpy(out)
        for part, queries in self._parts:
            width = part.stop - part.start
            step = max(16, _CACHE_BYTES // (4 * max(width, 1)))
            for start in range(0, len(rows), step):
                block = rows[start : start + step, part]
                # fp32 is copied, too: reading ahead, a copy is several times as fast as a GEMM is from main memory
                floats = self._scratch.array("floats", (len(block), width), np.float32)
                block = torch.from_numpy(floats).copy_(block)
                result[start : start + step].addmm_(block, queries)
        if self._dtype == "fp16":
            out *= tensors["scale"].view(np.float32)[:, None]
        return out


class PlaneProducts:
    """Products with rows in bit planes."""

    def __init__(
        self, torch: Any, layout: Layout, queries: F32, modules: Sequence[int] | None, bits: int | None
    ) -> None:
        """`queries` [d, q] over the chosen modules."""
        self._torch, self._scratch = torch, Scratch()
        self._planes = bits or layout.bits or 0
        self._unit = np.float32(1 << ((layout.bits or 0) - self._planes))
        chosen = list(range(len(layout.widths))) if modules is None else list(modules)
        self._modules = chosen
        count = queries.shape[1]
        self.step = 4096
        lost = np.zeros(count)
        halves = np.zeros(
            (len(chosen), count), np.float32
        )  # codes stand at the lower end of their cell, not its middle
        self._parts: list[tuple[int, slice, Any, Any]] = []
        row = 0
        for column, module in enumerate(chosen):
            width, first = layout.widths[module], layout.plane_bytes(module).start
            exact = queries[row : row + width].astype(np.float64)
            row += width
            largest = np.abs(exact).max(axis=0, initial=0)
            steps = np.where(largest > 0, largest, 1) / 127
            high = np.rint(exact / steps)
            low = np.rint((exact / steps - high) * 254)
            lost += np.square(exact - steps * (high + low / 254)).sum(axis=0)
            halves[column] = 0.5 * exact.sum(axis=0)
            both = np.zeros((-(-width // 8) * 8, 2 * count), np.int8)
            both[:width] = np.concatenate([high, low], axis=1)
            weights = torch.from_numpy(np.concatenate([steps, steps / 254]).astype(np.float32))
            for start in range(0, len(both), _CHUNK):
                part = torch.from_numpy(both[start : start + _CHUNK]).contiguous()
                columns = slice(first + start // 8, first + (start + len(part)) // 8)
                self._parts.append((column, columns, part, weights))
        self.error: F64 = np.sqrt(lost)
        self._halves = torch.from_numpy(halves)

    def __call__(self, tensors: Mapping[str, Stored]) -> F32:
        """float32 [n, q]."""
        torch = self._torch
        planes = [_tensor(torch, tensors[f"plane{p}"]) for p in range(self._planes)]
        scale = torch.from_numpy(tensors["scale"].view(np.float32)[:, self._modules] * self._unit)
        count = len(self.error)
        total = torch.zeros(len(scale), 2 * count)
        for column, span, queries, weights in self._parts:
            products = torch._int_mm(self._codes([plane[:, span] for plane in planes]), queries)
            total.addcmul_(products * weights, scale[:, column, None])
        result = torch.addmm(total[:, :count], scale, self._halves)
        result += total[:, count:]
        return result.numpy()

    def _codes(self, planes: list[Any]) -> Any:
        """int8 [n, 8 · bytes]: the b-bit code minus 2^(b-1)."""
        codes = self._look_up(planes[:2], "codes")
        for first in range(2, len(planes), 2):
            codes *= 4
            codes += self._look_up(planes[first : first + 2], "low")
        codes -= 1 << (len(planes) - 1)  # of 8 bits this wraps from 0…255 to -128…127, as it should
        return codes

    def _look_up(self, planes: list[Any], name: str) -> Any:
        torch = self._torch
        shape = tuple(planes[0].shape)
        index = torch.from_numpy(self._scratch.array("index", shape, np.int32)).copy_(planes[0])
        if len(planes) == 2:
            low = torch.from_numpy(self._scratch.array("index_low", shape, np.int32)).copy_(planes[1])
            torch.add(low, index, alpha=256, out=index)
        out = torch.from_numpy(self._scratch.array(name, shape, np.int64))
        torch.index_select(_table(torch, len(planes)), 0, index.view(-1), out=out.view(-1))
        return out.view(torch.int8)


@lru_cache(maxsize=2)
def _table(torch: Any, planes: int) -> Any:
    """Eight int8 codes in an int64, for each byte of one plane or each pair of bytes of two, high plane first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    codes = bits if planes == 1 else (2 * bits[:, None, :] + bits[None, :, :]).reshape(-1, 8)
    return torch.from_numpy(np.ascontiguousarray(codes).view(np.int64).reshape(-1))


class _Writable:
    """An array's memory under another name: torch warns of arrays that can't be written, though it only reads."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array  # keeps the map alive
        interface = dict(array.__array_interface__)
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor(torch: Any, array: Stored) -> Any:
    signed = array.view(np.int16) if array.dtype == np.uint16 else array
    return torch.from_numpy(np.asarray(_Writable(signed)))
