"""TopK (Gao et al. 2024, §2.3): the k largest of each token. With Multi-TopK the rest of the 4k largest refine it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsify._select import Rule
from sparsify._select import TopK as Largest
from sparsify.activations._base import Activation

if TYPE_CHECKING:
    from sparsify._coder import SparseCoder


class TopK(Activation):
    """The k largest."""

    def rule(self, coder: SparseCoder, k: int) -> Rule:
        """While Multi-TopK trains, 4k of them in order: the first k are the code."""
        if coder.training and coder.cfg.multi_topk and torch.is_grad_enabled():
            return Largest(min(4 * k, coder.num_latents), in_order=True)
        return Largest(k)


ACTIVATION = TopK()
