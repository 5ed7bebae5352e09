"""By gathers and index_add alone, a piece at a time: for devices with neither an embedding bag nor Triton."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 14
"""Entries whose rows are gathered at once."""


def bag(indices: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """See `sparsify.kernels`."""
    out = rows.new_zeros(begin.numel(), rows.shape[1])
    owner = torch.searchsorted(begin, torch.arange(indices.numel(), device=begin.device), right=True) - 1
    weights = weights.to(rows.dtype)
    for s in range(0, indices.numel(), PIECE):
        part = slice(s, s + PIECE)
        out.index_add_(0, owner[part], rows[indices[part]] * weights[part, None])
    return out


def dots(indices: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """See `sparsify.kernels`."""
    out = tokens.new_empty(indices.shape, dtype=rows.dtype)
    step = max(1, PIECE // max(indices.shape[1], 1))
    for s in range(0, indices.shape[0], step):
        part = slice(s, s + step)
        out[part] = (rows[indices[part]] @ tokens[part].to(rows.dtype).unsqueeze(-1)).squeeze(-1)
    return out
