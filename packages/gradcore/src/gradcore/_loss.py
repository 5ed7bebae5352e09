"""Per-example losses whose logits are never materialised whole.

Cross-entropy needs of the vocabulary only two reductions a position: log Σ_v exp(h·w_v), and for the gradient
Σ_v softmax_v w_v. Both come from one sweep over cache-sized tiles, so memory does not grow with vocabulary × tokens,
and the gradient with respect to h is known before the backward pass begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradcore._errors import CaptureError
from gradcore._vocabulary import softmax_mean

IGNORE = -100


def per_example_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """Next-token cross-entropy of each example in nats, in float32 whatever the dtype of the model.

    >>> hidden = torch.zeros(2, 3, 4, requires_grad=True)
    >>> per_example_loss(hidden, torch.zeros(5, 4), torch.tensor([[0, 1, 2], [0, 3, -100]])).exp().round()
    tensor([25.,  5.], grad_fn=<RoundBackward0>)

    Args:
        hidden: last hidden states ``[n, s, d]``, that is the input of the output embedding.
        weight: output embedding ``[vocabulary, d]``; it gets no gradient.
        labels: token ids ``[n, s]`` as transformers has them: position t is predicted from t−1, −100 is not counted.
        bias: output bias ``[vocabulary]``, or none.
        reduction: ``"sum"`` or ``"mean"`` over the labelled positions of each example.

    Returns:
        ``[n]``; an example without labelled positions has loss 0 and zero gradient.

    Raises:
        CaptureError: a label outside the vocabulary.
    """
    targets = labels[:, 1:]
    n, s, d = hidden.shape
    example, position = (targets != IGNORE).nonzero(as_tuple=True)
    picked = targets[example, position]
    if hidden.device.type == "cpu" and len(picked) and not 0 <= int(picked.min()) <= int(picked.max()) < len(weight):
        raise CaptureError(
            f"label {int(picked.max())} or {int(picked.min())} lies outside the vocabulary of {len(weight)} tokens: "
            "is the tokenizer the model's own?"
        )
    flat = hidden.reshape(n * s, d).index_select(0, example * s + position)  # [labelled, d]
    token_losses = token_loss(flat, weight, picked, bias)
    total = token_losses.new_zeros(n).index_add(0, example, token_losses)
    if reduction == "sum":
        return total
    return total / (targets != IGNORE).sum(1).clamp(min=1)


def token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-entropy of each row: ``[t, d], [vocabulary, d], [t]`` to ``[t]`` in float32."""
    return _TokenLoss.apply(hidden, weight, targets, bias)  # type: ignore[no-any-return]


class _TokenLoss(torch.autograd.Function):
    """Loss and its gradient in the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            mean, log_normaliser = softmax_mean(
                hidden.detach(), weight.detach(), None if bias is None else bias.detach()
            )
            chosen = weight.detach().index_select(0, targets).float()  # [t, d]
            target_logit = (hidden.detach().float() * chosen).sum(1)
            if bias is not None:
                target_logit += bias.detach().index_select(0, targets).float()
            ctx.save_for_backward(mean.sub_(chosen))
            ctx.dtype = hidden.dtype
            return log_normaliser - target_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None]).to(ctx.dtype), None, None, None
