"""By torch's embedding bag, which reads each row once and keeps nothing between."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def bag(indices: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """See `sparsify.kernels`."""
    return embedding_bag(indices, rows.contiguous(), begin, mode="sum", per_sample_weights=weights.to(rows.dtype))


def dots(indices: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """See `sparsify.kernels`. These are the gradient of an embedding bag with respect to its weights."""
    n, width = indices.shape
    owners = torch.arange(n, device=indices.device).repeat_interleave(width)
    begin = torch.arange(0, max(n * width, 1), max(width, 1), device=indices.device)
    product = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return product(tokens.contiguous(), rows, indices.flatten(), begin, owners, 0).view(n, width)
