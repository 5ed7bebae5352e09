"""Losses under the dataset's labels or under labels that the model itself draws.

With labels y ~ p(· | context) the second moment of the gradients is the Fisher information, which for cross-entropy is
the generalised Gauss-Newton matrix (Martens 2020, section 9.2); with the dataset's it is the empirical Fisher.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attribute.batching import Batch
from attribute.engine import finite_losses
from attribute.model import LanguageModel
from gradcore import IGNORE, CapturePlan, per_example_loss

LABELS = ("sampled", "dataset")
_CHUNK_FLOATS = 25_000_000


def losses_under(model: LanguageModel, batch: Batch, labels: str, seed: int, plan: CapturePlan) -> Tensor:
    """Losses ``[n]`` of a batch under ``labels``, with a graph."""
    if labels == "dataset":
        return finite_losses(model, batch, plan)
    reduction = plan.reduction
    if not model.fused:
        logits = model.model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
        drawn = _draw(batch, seed, lambda places: logits.detach().flatten(0, 1)[places])
        losses = torch.nn.functional.cross_entropy(logits.mT, drawn[:, 1:], reduction="none", ignore_index=IGNORE)
        total = losses.sum(1)
        return total if reduction == "sum" else total / (drawn[:, 1:] != IGNORE).sum(1).clamp(min=1)
    head = model.model.get_output_embeddings()  # type: ignore[operator]
    hidden = model.base(input_ids=batch.input_ids, use_cache=False)[0]
    flat = hidden.detach()[:, :-1].flatten(0, 1)

    def logits_of(places: Tensor) -> Tensor:
        return torch.nn.functional.linear(flat[places], head.weight, head.bias).float()

    drawn = _draw(batch, seed, logits_of)
    return per_example_loss(hidden, head.weight, drawn, bias=head.bias, reduction=reduction)


def _draw(batch: Batch, seed: int, logits_of: object) -> Tensor:
    """Labels ``[n, s]`` with every labelled token drawn anew, by inverting the distribution function at one uniform
    number a token that depends on seed, row and place alone."""
    n, s = batch.labels.shape
    uniform = np.stack([np.random.Generator(np.random.Philox(key=[seed, int(row)])).random(s) for row in batch.rows])
    wanted = (batch.labels[:, 1:] != IGNORE).flatten().nonzero().flatten()
    at = torch.from_numpy(uniform[:, 1:].reshape(-1).astype(np.float32)).to(batch.labels.device)[wanted]
    found = torch.empty(len(wanted), dtype=torch.long, device=batch.labels.device)
    rows, start = 1, 0
    while start < len(wanted):
        chunk = wanted[start : start + rows]
        with torch.no_grad():
            logits = logits_of(chunk)  # type: ignore[operator]
            cumulative = logits.softmax(-1).cumsum(-1)
            scaled = at[start : start + rows, None] * cumulative[:, -1:]
            found[start : start + rows] = torch.searchsorted(cumulative, scaled, right=True).flatten()
        found[start : start + rows].clamp_(max=logits.shape[-1] - 1)
        start += len(chunk)
        rows = max(16, _CHUNK_FLOATS // logits.shape[-1])
    drawn = torch.full((n, s - 1), IGNORE, device=batch.labels.device)
    drawn.view(-1)[wanted] = found
    return torch.cat((batch.labels[:, :1], drawn), dim=1)
