"""What a pass over a few tokens tells of a model before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attribute._errors import ModelError


def require_finite(model: nn.Module, name: str) -> None:
    """Raise :class:`ModelError` where a weight is NaN or infinite."""
    for parameter_name, parameter in model.named_parameters():
        # The sum is one cheap pass; only where it is odd is every entry looked at.
        if not parameter.detach().sum(dtype=torch.float32).isfinite() and not parameter.detach().isfinite().all():
            raise ModelError(f"{name or 'the model'}: the weight {parameter_name} holds NaN or infinity")


def is_linear(head: object) -> bool:
    """Whether it is a linear layer, or one that PEFT has wrapped."""
    inner = next((getattr(head, name) for name in ("base_layer", "original_module") if hasattr(head, name)), head)
    return isinstance(inner, nn.Linear)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and nothing has a gradient."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def require_same_logits(model: nn.Module, whole: nn.Module, name: str) -> None:
    """Raise :class:`ModelError` unless what PEFT has wrapped is all there is to the model."""
    ids = torch.arange(8, device=next(whole.parameters()).device)[None]
    with _evaluating(model):
        found, expected = (each(input_ids=ids, use_cache=False).logits for each in (model, whole))
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise ModelError(
            f"{name or type(model).__name__} does more than its layers say: adapters that lie in layers (LoRA and its "
            "kin) have gradients here, prompts that are put before a text have none"
        )


def is_plain(model: nn.Module, base: nn.Module, head: Any, name: str) -> bool:
    """Whether the model's logits are just the head applied to the base's output.

    One forward pass of two rows that differ in their last token. The head's output is replaced by known numbers of both
    signs and all sizes, so that a soft cap or a scale behind it shows however small the model's own logits are.

    Raises:
        ModelError: a later token changes the hidden states of an earlier one.
    """
    ids = torch.arange(8, device=head.weight.device).repeat(2, 1) % head.weight.shape[0]
    ids[1, -1] = 0
    known = torch.linspace(-100, 100, ids.numel() * head.weight.shape[0], device=ids.device, dtype=head.weight.dtype)
    known = known.view(*ids.shape, -1)
    seen: list[Tensor] = []

    def known_logits(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> Tensor:
        seen.append(given[0])
        return known

    handle = head.register_forward_hook(known_logits)
    try:
        with _evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits
            hidden = base(input_ids=ids, use_cache=False)[0]
    finally:
        handle.remove()
    drift = (hidden[0, :-1] - hidden[1, :-1]).float().norm() / hidden[0, :-1].float().norm()
    if drift > 100 * torch.finfo(hidden.dtype).eps:
        raise ModelError(
            f"{name or type(model).__name__} looks ahead: a later token changes what it says about earlier ones. "
            "Only causal (left-to-right) language models have the next-token loss that is measured here"
        )
    plain = isinstance(head, nn.Linear) and head.weight.is_floating_point()
    plain = plain and head.weight.shape == (head.out_features, head.in_features)
    return plain and len(seen) == 1 and torch.equal(seen[0], hidden) and torch.equal(logits.to(known.dtype), known)
