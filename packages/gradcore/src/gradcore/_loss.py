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
from gradcore._losses import Head, Loss, value_and_gradient
from gradcore._output_loss import LabelledBatch, Taking, takings

IGNORE = -100
_CE = Loss()


def per_example_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "sum",
    loss: str = "ce",
    reference: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Next-token loss of each example in nats, in float32 whatever the dtype of the model.

    >>> hidden = torch.zeros(2, 3, 4, requires_grad=True)
    >>> per_example_loss(hidden, torch.zeros(5, 4), torch.tensor([[0, 1, 2], [0, 3, -100]])).exp().round()
    tensor([25.,  5.], grad_fn=<RoundBackward0>)

    Memory grows neither with tokens × vocabulary nor with the vocabulary. A collector that is open and whose plan has
    ``weight`` gets its gradient as well.

    Args:
        hidden: last hidden states ``[n, s, d]``, that is the input of the output embedding.
        weight: output embedding ``[vocabulary, d]``; it gets no gradient.
        labels: token ids ``[n, s]`` as transformers has them: position t is predicted from t−1, −100 is not counted.
        bias: output bias ``[vocabulary]``, or none.
        reduction: ``"sum"`` or ``"mean"`` over the labelled positions of each example.
        loss: ``"ce"``, ``"ce(smoothing=0.1)"``, ``"log_odds"`` or ``"kl"``, see :class:`Loss`.
        reference: for ``"kl"``, hidden states, output embedding and bias of the model that is compared with.

    Returns:
        ``[n]``; an example without labelled positions has loss 0 and zero gradient.

    Raises:
        CaptureError: a label outside the vocabulary.
        GradCoreError: no such loss, or ``"kl"`` without a reference.
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
    other = None
    if reference is not None:
        states, its_weight, its_bias = reference
        other = Head(states.detach().reshape(n * s, -1).index_select(0, example * s + position), its_weight, its_bias)
    kind, takers = Loss.named(loss), takings(weight, n)
    if takers:
        head = Head(flat.detach(), weight.detach(), None if bias is None else bias.detach())
        batch = LabelledBatch(hidden.detach(), head, picked, example, position, kind, other)
        if not flat.requires_grad:  # nothing before is captured, the output embedding is
            flat = flat.detach().requires_grad_()
        token_losses = _CapturedLoss.apply(flat, batch, takers)
        assert isinstance(token_losses, Tensor)
    else:
        token_losses = token_loss(flat, weight, picked, bias, kind, other)
    total = token_losses.new_zeros(n).index_add(0, example, token_losses)
    if reduction == "sum":
        return total
    return total / (targets != IGNORE).sum(1).clamp(min=1)


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    loss: Loss = _CE,
    reference: Head | None = None,
) -> Tensor:
    """Loss of each row: ``[t, d], [vocabulary, d], [t]`` to ``[t]`` in float32."""
    return _TokenLoss.apply(hidden, weight, targets, bias, loss, reference)  # type: ignore[no-any-return]


class _TokenLoss(torch.autograd.Function):
    """Loss and its gradient in the forward pass; the backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        loss: Loss,
        reference: Head | None,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(hidden.detach(), weight.detach(), None if bias is None else bias.detach())
            value, gradient = value_and_gradient(loss, head, targets, reference)
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
            return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None]).to(ctx.dtype), None, None, None, None, None


class _CapturedLoss(torch.autograd.Function):
    """The same for collectors that capture the output embedding: they get its factors in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, batch: LabelledBatch, takers: list[Taking]) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            value, gradient = value_and_gradient(batch.loss, batch.head, batch.targets, batch.reference)
            ctx.save_for_backward(gradient)
            ctx.dtype, ctx.batch, ctx.takers = hidden.dtype, batch, takers
            return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            for each in ctx.takers:
                each.deliver(ctx.batch.blocks(grads[0], whole=each.whole))
        return (gradient * grads[0][:, None]).to(ctx.dtype), None, None
