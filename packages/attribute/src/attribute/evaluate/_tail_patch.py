"""Tail patch: one training step on a query's best rows, and what it does to the query.

Chang et al. 2024 (TrackStar), section 5.2: the rise of the query's log-probability after a step on a proponent, mean
over the k best rows of each query. Rows that are right about a query make it likelier.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch

from attribute._errors import AttributionError
from attribute.batching import assemble
from attribute.data import TokenFile
from attribute.engine import evaluating
from attribute.evaluate._retrieval import Estimate, bootstrap, rank
from attribute.model import LanguageModel


def tail_patch(
    model: LanguageModel,
    rows: TokenFile,
    queries: TokenFile,
    scores: np.ndarray,
    *,
    k: int = 10,
    learning_rate: float = 1e-3,
) -> Estimate:
    """Fall of a query's loss in nats after one gradient step of SGD on one of its ``k`` best rows, mean over both.

    Queries without a loss are left out; the step on a row that has a weight is times its weight.

    Args:
        model: as trained; it is copied, not changed.
        rows, queries: token files.
        scores: ``[queries, rows]``.
        k: rows a query.
        learning_rate: of the step, on the mean loss of the row's tokens.

    Raises:
        AttributionError: ``k`` or the learning rate is out of range.
    """
    if k < 1 or not 0 < learning_rate < float("inf"):
        raise AttributionError(f"--k must be at least 1 and --learning-rate positive, not {k} and {learning_rate}")
    patient = replace(model, **_copied(model))
    before = [parameter.detach().clone() for parameter in patient.model.parameters()]
    falls = []
    with evaluating(patient):
        for query in (each for each in range(len(queries)) if queries.labelled(each)[1:].any()):
            asked = assemble(queries, [query], model.device)
            with torch.no_grad():
                start = float(patient.losses(asked.input_ids, asked.labels, "mean"))
            found = []
            for row in rank(scores[query])[:k]:
                _step(patient, rows, row, learning_rate)
                with torch.no_grad():
                    found.append(start - float(patient.losses(asked.input_ids, asked.labels, "mean")))
                    for parameter, saved in zip(patient.model.parameters(), before):
                        parameter.copy_(saved)
            falls.append(float(np.mean(found)))
    return bootstrap(falls)


def _step(model: LanguageModel, rows: TokenFile, row: int, learning_rate: float) -> None:
    batch = assemble(rows, [row], model.device)
    parameters = list(model.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    # The fused head takes no gradient of its own weight: the model's logits do.
    logits = model.model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
    targets = batch.labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="sum", ignore_index=-100)
    if batch.weights is not None:
        total = total * batch.weights.sum()  # of its one row
    gradients = torch.autograd.grad(total / (targets != -100).sum().clamp(min=1), parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad_(False)
            if gradient is not None:
                parameter.sub_(gradient, alpha=learning_rate)


def _copied(model: LanguageModel) -> dict[str, torch.nn.Module]:
    whole = copy.deepcopy(model.model)
    return {"model": whole, "base": whole.base_model}  # type: ignore[dict-item]
