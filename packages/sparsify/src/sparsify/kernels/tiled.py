"""By Triton, on CUDA: tiles of a few entries by a few columns, summed in single precision whatever the dtype.

Each program owns its part of the output, so nothing is atomic and the same tensors give the same bits.
"""

# Triton reads annotations as values, so they are not postponed here.
import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 8
COLUMNS = 256


def bag(indices: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """See `sparsify.kernels`."""
    bags, width = begin.numel(), rows.shape[1]
    out = rows.new_empty(bags, width)
    ends = torch.cat((begin, begin.new_tensor([indices.numel()])))
    tile = min(COLUMNS, triton.next_power_of_2(width))
    if bags and width:
        grid = (bags, triton.cdiv(width, tile))
        tensors = indices.contiguous(), weights.contiguous(), ends, rows.contiguous(), out
        _bag[grid](*tensors, width, ENTRIES, tile, enable_fp_fusion=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return out


def dots(indices: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """See `sparsify.kernels`."""
    n, k = indices.shape
    width = rows.shape[1]
    out = tokens.new_empty(n, k, dtype=rows.dtype)
    entries, tile = min(ENTRIES, triton.next_power_of_2(max(k, 1))), min(COLUMNS, triton.next_power_of_2(width))
    if out.numel():
        grid = (n, triton.cdiv(k, entries))
        tensors = indices.contiguous(), tokens.contiguous(), rows.contiguous(), out
        _dots[grid](*tensors, k, width, entries, tile, enable_fp_fusion=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return out


@triton.jit
def _bag(indices, weights, ends, rows, out, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    first, last = tl.load(ends + bag), tl.load(ends + bag + 1)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        mine = entry < last
        row = tl.load(indices + entry, mask=mine, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=mine, other=0.0).to(tl.float32)
        tile = tl.load(rows + row[:, None] * width + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32) * weight[:, None], axis=0)
    tl.store(out + bag * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots(indices, tokens, rows, out, k, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    mine = entry < k
    row = tl.load(indices + token * k + entry, mask=mine, other=0).to(tl.int64)
    total = tl.zeros([ENTRIES], dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        values = tl.load(tokens + token * width + column, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(rows + row[:, None] * width + column[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32) * values[None, :], axis=1)
    tl.store(out + token * k + entry, total.to(out.dtype.element_ty), mask=mine)
