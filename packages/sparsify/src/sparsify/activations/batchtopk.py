"""BatchTopK (Bussmann et al. 2024): the k·N largest of a batch of N tokens; alone, all above a learned threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify._errors import ConfigError
from sparsify._select import Above, Rule
from sparsify._select import BatchTopK as LargestOfBatch
from sparsify.activations._base import Activation

if TYPE_CHECKING:
    from sparsify._coder import SparseCoder

RATE = 0.01
"""How fast the threshold follows the smallest activation that a batch kept."""


class BatchTopK(Activation):
    """The budget is the batch's, not the token's."""

    cuttable = False

    def add_parameters(self, coder: SparseCoder, made: dict[str, Any]) -> None:
        """−1: not yet learned. In fp32 whatever the coder's dtype, because it is a running mean."""
        coder.register_buffer("threshold", torch.tensor(-1.0, device=made["device"]))

    def rule(self, coder: SparseCoder, k: int) -> Rule:
        """The batch's largest while training; later every token must be encodable alone."""
        if coder.training:
            return LargestOfBatch(k, coder.num_latents)
        if float(coder.threshold) < 0:
            raise ConfigError(
                "this batchtopk coder has no learned threshold yet, so tokens cannot be encoded one by one: "
                "train it, or call .train() to select within the batch"
            )
        return Above(coder.threshold.to(coder.dtype))

    @torch.no_grad()
    def observe(self, coder: SparseCoder, acts: Tensor) -> None:
        """Move the threshold towards the smallest activation kept; a batch that kept none says nothing."""
        smallest = torch.where(acts > 0, acts, torch.inf).min()
        if not smallest.isfinite():
            return
        first = coder.threshold < 0
        step = coder.threshold + RATE * (smallest - coder.threshold)
        coder.threshold.copy_(torch.where(first, smallest, step))


ACTIVATION = BatchTopK()
