"""End-to-end losses: the model's own, with every coder spliced in at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify import _hooks
from sparsify._coder import SparseCoder
from sparsify._errors import DataError


def logits_of(output: object) -> Tensor:
    """A model's logits, (rows, tokens, vocabulary)."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise DataError(
            "the model returns no logits, so there is no cross-entropy or KL: load it with its language-model head"
        )
    return logits


def spliced_loss(
    model: nn.Module, coders: Mapping[str, SparseCoder], tokens: Tensor, keep: Tensor, loss: str, k: int
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Mean CE, or KL(clean ‖ spliced), per token, and each coder's code (acts, indices).

    Args:
        tokens: (rows, tokens). keep: where coders are spliced in; elsewhere the activation stays what it was.
        loss: "ce" or "kl".
        k: active latents.
    """
    codes: dict[str, tuple[Tensor, Tensor]] = {}

    def replacement(name: str, coder: SparseCoder) -> _hooks.Replacement:
        def replace(x: Tensor | None, y: Tensor) -> Tensor:
            source = (x if coder.cfg.transcode and x is not None else y).float()
            # total_variance=1: the reconstruction is wanted, its FVU is not.
            out = coder(source, y.float(), total_variance=source.new_ones(()), k=k)
            codes[name] = (out.latent_acts.detach(), out.latent_indices)
            return torch.where(keep[..., None], out.sae_out.to(y.dtype), y)

        return replace

    with _hooks.spliced(model, {name: replacement(name, coder) for name, coder in coders.items()}):
        spliced = logits_of(_hooks.call(model, tokens))[:, :-1].float()
    if loss == "ce":
        value = nn.functional.cross_entropy(spliced.flatten(0, 1), tokens[:, 1:].flatten())
    else:
        with torch.no_grad():
            clean = logits_of(_hooks.call(model, tokens))[:, :-1].float().log_softmax(-1)
        value = nn.functional.kl_div(
            spliced.log_softmax(-1).flatten(0, 1), clean.flatten(0, 1), reduction="batchmean", log_target=True
        )
    return value, codes
