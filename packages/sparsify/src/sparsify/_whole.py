"""What a chunk of a batch must know of the whole: its variance, its tokens, its active latents.

A batch may come in chunks (``micro_acc_steps``) and in several processes' parts. Losses are shares of the whole
batch's, so that chunks and parts add up to the loss, and the gradient, of the batch in one piece.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify._coder import SparseCoder
from sparsify._errors import DataError
from sparsify._source import Pair, not_finite

Total = Callable[[Tensor], Tensor]
"""From this process's sum to the sum over all that hold a part of the batch."""


def spread(y: Tensor, total: Total) -> tuple[Tensor, Tensor]:
    """Σ‖y − ȳ‖² and the number of tokens, of a batch of which y (N, D) is this process's part."""
    tokens = total(y.new_tensor(float(len(y))))
    mean = total(y.sum(0)) / tokens
    return total((y - mean).square().sum()), tokens


def learnable_spread(pair: Pair, hook: str, index: int, total: Total) -> tuple[Tensor, Tensor]:
    """The same of a hookpoint's targets.

    Raises:
        DataError: there is nothing to learn, or what is not finite to learn from.
    """
    variance, tokens = spread(pair.y, total)
    if not bool(torch.isfinite(variance + pair.x.sum())):
        raise not_finite(hook, index, "output" if pair.x is pair.y or not bool(torch.isfinite(variance)) else "input")
    if float(tokens) == 1:
        raise DataError(f"batch {index}: {hook} yields one vector, which has no variance to explain: raise batch_size")
    if not float(variance):
        raise DataError(f"batch {index}: {hook} yields the same vector for every token, so there is nothing to learn")
    return variance, tokens


def active_total(coder: SparseCoder, x: Tensor, chunks: int, total: Total) -> Total:
    """`Batch.total` for a coder that is given x in chunks: what later chunks will count is counted ahead."""
    if chunks == 1 or not coder.activation.counts_batch:
        return total
    with torch.no_grad():
        counts = [(coder.encode(part).top_acts > 0).sum() for part in x.chunk(chunks)]
    active = total(torch.stack(counts).sum().to(x.dtype))
    return lambda _: active
