"""End-to-end losses: the model's own, with every coder spliced in at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsify import _hooks
from sparsify._coder import ForwardOutput, SparseCoder
from sparsify._errors import DataError, HookpointError
from sparsify._whole import Total, spread


def logits_of(output: object) -> Tensor:
    """A model's logits, (rows, tokens, vocabulary)."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise DataError(
            "the model returns no logits, so there is no cross-entropy or KL: load it with its language-model head"
        )
    return logits


def check_next_tokens(rows: Tensor) -> None:
    """Refuse rows in which there is no next token to predict."""
    if rows.is_floating_point():
        raise DataError("the rows are not token ids, so there is no next token to predict: use loss_fn='fvu'")
    if rows.shape[1] < 2:
        raise DataError("rows of one token have no next token to predict: raise ctx_len")


def spliced_loss(
    model: nn.Module,
    coders: Mapping[str, SparseCoder],
    tokens: Tensor,
    keep: Tensor | None,
    loss: str,
    k: int,
    dead: Mapping[str, Tensor | None],
    total: Total,
) -> tuple[Tensor, dict[str, ForwardOutput]]:
    """Mean CE, or KL(clean ‖ spliced), per token, and what each coder made of the tokens it was given.

    Args:
        tokens: (rows, tokens). keep: where coders are spliced in, None for everywhere; elsewhere the activation stays
            what it was, and no coder sees it.
        loss: "ce" or "kl".
        k: active latents.
        dead: the latents that AuxK should revive, by coder.
        total: sums over the processes that hold parts of the batch.

    Raises:
        DataError: a hookpoint's values are not finite.
    """
    outs: dict[str, ForwardOutput] = {}

    def replacement(name: str, coder: SparseCoder) -> _hooks.Replacement:
        def replace(x: Tensor | None, y: Tensor) -> Tensor:
            source = x if coder.cfg.transcode and x is not None else y
            if source.shape[:-1] != tokens.shape or y.shape[:-1] != tokens.shape:
                raise HookpointError(
                    f"{name} maps {tuple(source.shape)} to {tuple(y.shape)} for {tuple(tokens.shape)} tokens: an "
                    "end-to-end loss needs one vector per token there"
                )
            given = source.flatten(0, 1).float() if keep is None else source[keep].float()
            target = given if source is y else y.flatten(0, 1).float() if keep is None else y[keep].float()
            variance, count = spread(target.detach(), total)
            if not bool(torch.isfinite(variance)):
                raise DataError(f"{name} yields values that are not finite")
            batch_is = {"total_variance": variance.clamp_min(1e-30), "total_tokens": count, "total": total}
            out = coder(given, target, dead_mask=dead[name], k=k, **batch_is)
            outs[name] = out
            made = out.sae_out.to(y.dtype)
            return made.view_as(y) if keep is None else y.masked_scatter(keep[..., None], made)

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
    return value, outs
