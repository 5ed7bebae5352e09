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

from sparsify._select import Selection, joined, largest, row_topk
from sparsify.kernels import kernels_for

BLOCK_BYTES = 24 << 20
"""As for the blocks of all products: what glibc reuses instead of mapping it again."""
_OFFERED = 2  # candidates for each latent that is kept
_LEAST_WIDTH, _LEAST_LATENTS = 256, 4096  # below, the product is too small a part of the step
_TRIAL = 256  # rows that show whether the bound proves anything
_ROUNDING = 2.0**-6  # four times the relative error of bf16: of the sum, of a product before it, and to spare


def screens(x: Tensor, weight: Tensor, k: int) -> bool:
    """Whether screening is faster than float32 products of ``x`` (N, D) with ``weight`` (M, D)."""
    latents, width = weight.shape
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and width >= _LEAST_WIDTH
        and latents >= max(_LEAST_LATENTS, 32 * k)
        and not torch.is_autocast_enabled("cpu")  # there the products that choose are bf16 by intent
        and _fast_bf16()
    )


def screened_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Selection:
    """The k largest of ``x Wᵀ + b`` in each row, with their float32 values.

    Args:
        x: (N, D). weight: (M, D). bias: (M,). All float32 on a CPU.
        k: how many; at most M / 32.
    """
    screen = _Screen(weight, bias, k)
    first, doubtful = screen.topk(x[:_TRIAL])
    if len(x) <= _TRIAL:
        return first
    # Where rows of the encoder differ much in norm the bound is loose, and screening would be for nothing.
    rest = x[_TRIAL:]
    return joined([first, screen.in_full(rest) if 2 * len(doubtful) > _TRIAL else screen.topk(rest)[0]])


class _Screen:
    """What is known of one encoder: its rounded rows, and the norms that bound what rounding hides."""

    def __init__(self, weight: Tensor, bias: Tensor, k: int) -> None:
        self._weight, self._bias, self._k = weight, bias, k
        self._rounded, self._rounded_bias = weight.bfloat16(), bias.bfloat16()
        self._norm = weight.norm(dim=1).amax()
        self._lost = (weight - self._rounded.float()).norm(dim=1).amax()
        self._largest_bias = bias.abs().amax()

    def topk(self, x: Tensor) -> tuple[Selection, Tensor]:
        """The choice, and which rows had to be done again in full."""
        candidates, least = self.candidates(x)
        exact = kernels_for(x).dots(candidates, x, self._weight) + self._bias[candidates]
        chosen = largest(exact, self._k)
        values, indices = exact.gather(1, chosen), candidates.gather(1, chosen)
        doubtful = (~(values.amin(1) > least + self.hidden(x, least))).nonzero().squeeze(1)
        if len(doubtful):
            values[doubtful], indices[doubtful], _ = self.in_full(x[doubtful])
        return Selection(values, indices, None), doubtful

    def in_full(self, x: Tensor) -> Selection:
        """The choice by float32 products, a block at a time."""
        step = max(1, BLOCK_BYTES // (4 * len(self._weight)))
        parts = [row_topk(torch.addmm(self._bias, some, self._weight.T), self._k) for some in x.split(step)]
        return joined([Selection(*part, None) for part in parts])

    def candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents with the largest products in bf16 (N, 2k), and the least of those products (N,)."""
        offered, latents = _OFFERED * self._k, len(self._rounded)
        rows = max(1, min(len(x), BLOCK_BYTES // (2 * latents)))
        x, buffer = x.bfloat16(), self._rounded.new_empty(rows, latents)
        found, least = x.new_empty(len(x), offered, dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)
        for start in range(0, len(x), rows):
            some = slice(start, start + rows)
            block = torch.addmm(self._rounded_bias, x[some], self._rounded.T, out=buffer[: len(x[some])])
            values, found[some] = row_topk(block, offered)
            least[some] = values.amin(1)
        return found, least

    def hidden(self, x: Tensor, least: Tensor) -> Tensor:
        """By how much the product of a latent that was passed over can exceed ``least`` (N,)."""
        near = x.bfloat16().float()
        of_factors = (x - near).norm(dim=1) * self._norm + near.norm(dim=1) * self._lost
        # The bias is rounded, and so is the sum, perhaps before and after the bias is added.
        return of_factors + _ROUNDING * (least.abs() + self._largest_bias)


def _fast_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())
