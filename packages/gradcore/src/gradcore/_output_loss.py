"""The output embedding's gradient inside the fused loss, ∂ℓ/∂W = Σ_t (∂ℓ_t/∂logits_t) h_tᵀ, without keeping logits.

The loss itself never has the logits at once, so no hook on the output embedding can see their gradient. Open collectors
whose plan has that matrix are found by the weight itself, and get the two factors in blocks of examples of which the
logits fit into a cache-sized buffer; the first factor is sketched before the next block is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcore._losses import CHUNK_FLOATS, Head, Loss, logit_gradient


@dataclass(frozen=True)
class Taking:
    """One batch of somebody who captures the gradient of an output embedding.

    Attributes:
        deliver: takes blocks of examples: inputs ``[k, s, d]`` and gradients of the logits ``[k, s, vocabulary]``.
        whole: whether all examples must come in one block.
    """

    deliver: Callable[[Iterator[tuple[Tensor, Tensor]]], None]
    whole: bool


Taker = Callable[[Tensor, int], Taking | None]
"""Asked in the forward pass with the weight and the number of examples; ``None`` where the weight is none of theirs."""

TAKERS: ContextVar[tuple[Taker, ...]] = ContextVar("gradcore_takers", default=())


def takings(weight: Tensor, examples: int) -> list[Taking]:
    """Of all who capture this output embedding now."""
    return [found for taker in TAKERS.get() if (found := taker(weight, examples)) is not None]


@dataclass(frozen=True)
class LabelledBatch:
    """Which positions of a batch ``[n, s]`` have a label, row by row, and what the losses there are of.

    Attributes:
        hidden: ``[n, s, d]``.
        head: hidden states of the labelled positions, and the output embedding.
        targets: their labels ``[t]``.
        example, position: where they are ``[t]``.
        loss: the measured loss.
        reference: what it compares with, or none.
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    example: Tensor
    position: Tensor
    loss: Loss
    reference: Head | None

    def blocks(self, upstream: Tensor, *, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``[k, s, d]`` and gradients of the logits ``[k, s, vocabulary]``, times ``upstream [t]``."""
        n, s, _ = self.hidden.shape
        vocabulary = len(self.head.weight)
        step = n if whole else max(1, CHUNK_FLOATS // (s * vocabulary))
        for start in range(0, n, step):
            stop = min(start + step, n)
            ends = torch.searchsorted(self.example, torch.tensor([start, stop], device=self.example.device)).tolist()
            rows = slice(*ends)
            gradient = logit_gradient(self.loss, self.head, self.targets, self.reference, rows)
            gradient *= upstream[rows, None]
            out = gradient.new_zeros(stop - start, s, vocabulary)
            out[self.example[rows] - start, self.position[rows]] = gradient
            yield self.hidden[start:stop], out
