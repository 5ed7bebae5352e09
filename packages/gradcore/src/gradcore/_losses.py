"""Losses of a token by the hidden state that predicts it, each with its gradient in the same pass over the vocabulary.

With l = h Wᵀ + b, p = softmax(l), y the label and w̄ the mean row of W:

===============  =========================================  ==========================================
``ce``           −log p_y                                   E_p[w] − w_y
``ce`` smoothed  (1−ε)(−log p_y) + ε mean_v(−log p_v)       E_p[w] − (1−ε) w_y − ε w̄
``log_odds``     −log(p_y / (1 − p_y))                      (E_p[w] − w_y) / (1 − p_y)
``kl``           Σ_v p_v (log p_v − log r_v)                Σ_v p_v (log p_v − log r_v − KL) w_v
===============  =========================================  ==========================================

Log odds are TRAK's model output (Park et al. 2023, section 3.2), turned so that less is better; unlike cross-entropy
their gradient does not vanish where the model is sure. The reference r of ``kl`` is another model's prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._vocabulary import softmax_mean

LOSSES = ("ce", "log_odds", "kl")
CHUNK_FLOATS = 25_000_000
_SURE = 1e-7  # 1 − p below this is noise of float32


@dataclass(frozen=True)
class Loss:
    """Which loss: the meaning of a plan's ``loss``.

    >>> Loss.named("ce(smoothing=0.1)")
    Loss(name='ce', smoothing=0.1)

    Args:
        name: one of :data:`LOSSES`.
        smoothing: ε of label smoothing, from 0 up to 1; of cross-entropy only.
    """

    name: str = "ce"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise GradCoreError(f"a loss is one of {', '.join(LOSSES)}, not {self.name!r}")
        if not 0 <= self.smoothing < 1 or (self.smoothing and self.name != "ce"):
            raise GradCoreError(
                f"label smoothing lies between 0 and 1 and belongs to ce, not {self.smoothing} of {self.name}"
            )

    def __str__(self) -> str:
        """As a plan names it; :meth:`named` reads it."""
        return f"{self.name}(smoothing={self.smoothing:g})" if self.smoothing else self.name

    @classmethod
    def named(cls, text: str) -> Loss:
        """The loss of that name."""
        name, _, rest = text.partition("(smoothing=")
        try:
            return cls(name, float(rest.removesuffix(")")) if rest else 0.0)
        except ValueError:
            raise GradCoreError(f"a loss is one of {', '.join(LOSSES)}, not {text!r}") from None


@dataclass(frozen=True)
class Head:
    """An output embedding ``[vocabulary, d]``, its bias or none, and the hidden states ``[t, d]`` before it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        """``[t, vocabulary]`` in float32."""
        logits = self.hidden[rows].float() @ self.weight.float().T
        return logits if self.bias is None else logits.add_(self.bias.float())


def value_and_gradient(loss: Loss, head: Head, targets: Tensor, reference: Head | None) -> tuple[Tensor, Tensor]:
    """Losses ``[t]`` and their gradients ``[t, d]`` with respect to the hidden states, in float32."""
    if loss.name == "kl":
        if reference is None:
            raise GradCoreError("the loss kl compares with a reference: give its hidden states")
        return _kl(head, reference)
    mean, log_normaliser = softmax_mean(head.hidden, head.weight, head.bias)
    chosen = head.weight.index_select(0, targets).float()  # [t, d]
    target_logit = (head.hidden.float() * chosen).sum(1)
    if head.bias is not None:
        target_logit += head.bias.index_select(0, targets).float()
    value = log_normaliser - target_logit
    if loss.smoothing:
        centre = head.weight.float().mean(0)
        even = head.hidden.float() @ centre
        if head.bias is not None:
            even = even + head.bias.float().mean()
        value = (1 - loss.smoothing) * value + loss.smoothing * (log_normaliser - even)
        return value, mean.sub_(chosen, alpha=1 - loss.smoothing).sub_(centre, alpha=loss.smoothing)
    gradient = mean.sub_(chosen)
    if loss.name == "log_odds":
        left = (-torch.expm1(-value)).clamp_(min=_SURE)  # 1 − p_y
        return value + left.log(), gradient.div_(left[:, None])
    return value, gradient


def logit_gradient(loss: Loss, head: Head, targets: Tensor, reference: Head | None, rows: slice) -> Tensor:
    """∂ℓ/∂logits of some tokens, ``[t, vocabulary]`` in float32; times W it is the gradient of the hidden states."""
    logits = head.logits(rows)
    if loss.name == "kl":
        assert reference is not None
        return _kl_of(logits, reference, rows)[1]
    labels = targets[rows, None]
    if loss.name == "log_odds":
        value = -logits.log_softmax(1).gather(1, labels)
        gradient = logits.softmax(1).scatter_add_(1, labels, torch.full_like(value, -1.0))
        return gradient.div_((-torch.expm1(-value)).clamp_(min=_SURE))
    gradient = logits.softmax(1)
    gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, loss.smoothing - 1))
    return gradient.sub_(loss.smoothing / len(head.weight)) if loss.smoothing else gradient


def _kl(head: Head, reference: Head) -> tuple[Tensor, Tensor]:
    """In blocks of tokens, so that memory does not grow with tokens × vocabulary."""
    tokens, width = head.hidden.shape
    value = head.hidden.new_empty(tokens, dtype=torch.float32)
    gradient = head.hidden.new_empty(tokens, width, dtype=torch.float32)
    rows = max(16, CHUNK_FLOATS // len(head.weight))
    for start in range(0, tokens, rows):
        some = slice(start, start + rows)
        value[some], by_logits = _kl_of(head.logits(some), reference, some)
        gradient[some] = by_logits @ head.weight.float()
    return value, gradient


def _kl_of(logits: Tensor, reference: Head, rows: slice) -> tuple[Tensor, Tensor]:
    """The divergence of some tokens ``[t]`` and its gradient ``[t, vocabulary]`` with respect to their logits."""
    log_p = logits.log_softmax(1)
    apart = log_p - reference.logits(rows).log_softmax(1)
    p = log_p.exp_()
    value = (p * apart).sum(1)
    return value, p.mul_(apart.sub_(value[:, None]))
