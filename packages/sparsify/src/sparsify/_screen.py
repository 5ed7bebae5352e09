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

from sparsify._select import Selection, largest, row_topk
from sparsify.kernels import kernels_for

BLOCK_BYTES = 24 << 20
"""As for the blocks of all products: what glibc reuses instead of mapping it again."""
_OFFERED = 2  # candidates for each latent that is kept
_LEAST_WIDTH, _LEAST_LATENTS = 256, 4096  # below, the product is too small a part of the step
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
    candidates, least = _candidates(x, weight, bias, _OFFERED * k)
    exact = kernels_for(x).dots(candidates, x, weight) + bias[candidates]
    chosen = largest(exact, k)
    values, indices = exact.gather(1, chosen), candidates.gather(1, chosen)
    doubtful = (~(values.amin(1) > least + _hidden(x, weight, bias, least))).nonzero().squeeze(1)
    if len(doubtful):
        step = max(1, BLOCK_BYTES // (4 * len(weight)))
        for some in doubtful.split(step):
            values[some], indices[some] = row_topk(torch.addmm(bias, x[some], weight.T), k)
    return Selection(values, indices, None)


def _candidates(x: Tensor, weight: Tensor, bias: Tensor, offered: int) -> tuple[Tensor, Tensor]:
    """The latents with the largest products in bf16 (N, offered), and the least of those products (N,)."""
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    rows = max(1, min(len(x), BLOCK_BYTES // (2 * len(weight))))
    buffer = x.new_empty(rows, len(weight))
    found, least = x.new_empty(len(x), offered, dtype=torch.int64), x.new_empty(len(x), dtype=torch.float32)
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        block = torch.addmm(bias, x[some], weight.T, out=buffer[: len(x[some])])
        values, found[some] = row_topk(block, offered)
        least[some] = values.amin(1)
    return found, least


def _hidden(x: Tensor, weight: Tensor, bias: Tensor, least: Tensor) -> Tensor:
    """By how much the product of a latent that was passed over can exceed ``least`` (N,)."""
    near_x, near_weight = x.bfloat16().float(), weight.bfloat16().float()
    of_x = (x - near_x).norm(dim=1) * weight.norm(dim=1).amax()
    of_weight = near_x.norm(dim=1) * (weight - near_weight).norm(dim=1).amax()
    return of_x + of_weight + _ROUNDING * (least.abs() + bias.abs().amax())


def _fast_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())
