"""The factors of a per-example gradient: dense, or one-hot where a table is looked up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneHot:
    """One-hot vectors ``[n, s, width]`` kept as their positions; −1 is the zero vector.

    Attributes:
        ids: ``[n, s]``.
        width: length of each vector.
    """

    ids: Tensor
    width: int

    def dense(self) -> Tensor:
        """Written out, ``[n, s, width]`` float32."""
        out = torch.zeros(*self.ids.shape, self.width, device=self.ids.device)
        return out.scatter_(-1, self.ids.clamp(min=0)[..., None], (self.ids >= 0).float()[..., None])

    def rows_of(self, matrix_t: Tensor) -> Tensor:
        """The product with ``matrix_t [width, d]``, that is a lookup: ``[n, s, d]``."""
        found = matrix_t[self.ids.clamp(min=0)]
        return torch.where((self.ids >= 0)[..., None], found, 0)

    def transposed_product(self, right: Tensor) -> Tensor:
        """``Σ_s onehot_s right_sᵀ``: rows of ``right [n, s, d]`` summed where they belong, ``[n, width, d]``."""
        total = right.new_zeros(len(right), self.width + 1, right.shape[-1])
        places = torch.where(self.ids >= 0, self.ids, self.width)[..., None].expand_as(right)
        return total.scatter_add_(1, places, right)[:, : self.width]


Factor = Tensor | OneHot


def with_ones(factor: Tensor, bias: bool) -> Tensor:
    """``[n, s, d]``, or ``[n, s, d + 1]`` with a last column of ones, which a bias sees as its input."""
    if not bias:
        return factor
    return torch.cat((factor, factor.new_ones(*factor.shape[:-1], 1)), dim=-1)
