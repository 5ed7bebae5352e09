"""The k largest products of each row, exactly, found among candidates that cheaper products name.

Where a CPU multiplies bf16 at twice the speed of float32, the products are made in bf16, the 2k largest of each row
become candidates, and those are computed again in float32. What was passed over cannot have been larger: with x̂ and ŵ
the rounded factors,

    |⟨x, w⟩ − ⟨x̂, ŵ⟩| ≤ ‖x − x̂‖ ‖w‖ + ‖x̂‖ ‖w − ŵ‖                       (Cauchy–Schwarz)

bounds what rounding can have hidden. A row whose k-th value does not clear that bound is done again in float32. The
choice is that of float32 products, up to their own rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify._select import BLOCK_BYTES, Selection, joined, largest, row_topk
from sparsify.kernels import kernels_for

_OFFERED = 2  # candidates for each latent that is kept
_LEAST_SHARE = 128  # latents for each that is kept: candidates cost, too
_LEAST_WIDTH, _LEAST_LATENTS = 256, 4096  # below, the product is too small a part of the step
_LEAST_ROWS = 1024  # the whole encoder is rounded for each batch
_TRIAL, _STRETCH = 256, 2048  # rows after which it is asked whether the bound proves anything
_PART_FLOATS = 1 << 20
_UNSEEN = 1e-16  # norms sum squares, which vanish in float32 below 1e-19 an entry
_ROUNDING = 2.0**-6  # four times the relative error of bf16: of the sum, of a product before it, and to spare


def screens(x: Tensor, weight: Tensor, k: int) -> bool:
    """Whether screening is faster than float32 products of ``x`` (N, D) with ``weight`` (M, D)."""
    latents, width = weight.shape
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and width >= _LEAST_WIDTH
        and latents >= max(_LEAST_LATENTS, _LEAST_SHARE * k)
        and len(x) >= _LEAST_ROWS
        and not torch.is_autocast_enabled("cpu")  # there the products that choose are bf16 by intent
        and _fast_bf16()
    )


def screened_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Selection:
    """The k largest of ``x Wᵀ + b`` in each row, with their float32 values.

    Args:
        x: (N, D). weight: (M, D). bias: (M,). All float32 on a CPU.
        k: how many; at most M / 4.
    """
    screen, parts, start, size = _Screen(weight, bias, k), [], 0, _TRIAL
    while start < len(x):
        part, doubtful = screen.topk(x[start : start + size])
        parts.append(part)
        start, many = start + size, 2 * doubtful > len(part.indices)
        if many and start < len(x):
            # Where rows of the encoder differ much in norm the bound is loose, and screening would be for nothing.
            parts.append(screen.in_full(x[start:]))
            break
        size = _STRETCH
    return joined(parts) if parts else screen.in_full(x)


class _Screen:
    """What is known of one encoder: its rounded rows, and the norms that bound what rounding hides."""

    def __init__(self, weight: Tensor, bias: Tensor, k: int) -> None:
        self._weight, self._bias, self._k = weight, bias, k
        self._rounded, self._rounded_bias = weight.bfloat16(), bias.bfloat16()
        self._buffer = self._rounded.new_empty(max(1, BLOCK_BYTES // (2 * len(weight))), len(weight))
        self._largest_bias = bias.abs().amax()
        self._norm = self._lost = bias.new_zeros(())
        step = max(1, _PART_FLOATS // weight.shape[1])
        for whole, rounded in zip(weight.split(step), self._rounded.split(step)):
            self._norm = torch.maximum(self._norm, whole.norm(dim=1).amax())
            self._lost = torch.maximum(self._lost, (whole - rounded.float()).norm(dim=1).amax())

    def topk(self, x: Tensor) -> tuple[Selection, int]:
        """The choice, and how many rows had to be done again in full."""
        candidates, least = self.candidates(x)
        exact = kernels_for(x).dots(candidates, x, self._weight) + self._bias[candidates]
        chosen = largest(exact, self._k)
        values, indices = exact.gather(1, chosen), candidates.gather(1, chosen)
        doubtful = (~(values.amin(1) > least + self.hidden(x, least))).nonzero().squeeze(1)
        if len(doubtful):
            values[doubtful], indices[doubtful], _ = self.in_full(x[doubtful])
        return Selection(values, indices, None), len(doubtful)

    def in_full(self, x: Tensor) -> Selection:
        """The choice by float32 products, a block at a time."""
        step = max(1, BLOCK_BYTES // (4 * len(self._weight)))
        parts = [row_topk(torch.addmm(self._bias, some, self._weight.T), self._k) for some in x.split(step)]
        return joined([Selection(*part, None) for part in parts])

    def candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents with the largest products in bf16 (N, 2k), and the least of those products (N,)."""
        offered, rows, x = _OFFERED * self._k, len(self._buffer), x.bfloat16()
        found, least = x.new_empty(len(x), offered, dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)
        for start in range(0, len(x), rows):
            some = slice(start, start + rows)
            block = torch.addmm(self._rounded_bias, x[some], self._rounded.T, out=self._buffer[: len(x[some])])
            values, found[some] = row_topk(block, offered)
            least[some] = values.amin(1)
        return found, least

    def hidden(self, x: Tensor, least: Tensor) -> Tensor:
        """By how much the product of a latent that was passed over can exceed ``least`` (N,)."""
        near = x.bfloat16().float()
        of_x = ((x - near).norm(dim=1) + _UNSEEN) * (self._norm + _UNSEEN)
        of_weight = (near.norm(dim=1) + _UNSEEN) * (self._lost + _UNSEEN)
        # The bias is rounded, and so is the sum, perhaps before and after the bias is added.
        return of_x + of_weight + _ROUNDING * (least.abs() + self._largest_bias)


def _fast_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())
