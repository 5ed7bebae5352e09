"""How a batch is scored: factors meet the queries module by module, or sketched rows meet them all at once.

Whole gradients are never kept: in the backward pass each module's factors meet the queries, by the route that the plan
has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attribute._errors import ModelError
from attribute.batching import Batch
from attribute.engine import Measure, RowBlock, by_position, finite_losses, labelled_tokens
from attribute.meeting import Meeting
from attribute.model import LanguageModel
from attribute.scoring import _forward_mode
from attribute.scoring._queries import Queries
from attribute.scoring._routes import FORWARD, Route
from gradcore import GradientCollector, Identity


@contextmanager
def measuring(model: LanguageModel, queries: Queries, route: Route) -> Iterator[Measure]:
    """A measurement whose blocks hold scores ``[n, columns]``, or ``[n, s, columns]`` of tokens, as gradients."""
    if route.kind == FORWARD:
        yield _by_forward_mode(model, queries)
        return
    plan, tokens = queries.plan, bool(queries.config.tokens)
    if not isinstance(plan.sketch, Identity):
        with model.collector(plan, per_position=tokens) as collector:
            yield _by_rows(model, queries, collector)
        return
    normalizer = plan.normalizer
    meeting = Meeting(
        lambda name: [queries.module(name, number) for number in range(len(queries.slices))],
        norms=queries.config.unit_normalize,
        waits=normalizer is not None and not normalizer.factored,
        route=route.product,
    )
    with model.collector(plan, factors=meeting.receive, per_position=tokens):
        yield _by_factors(model, queries, meeting)


def _by_rows(model: LanguageModel, queries: Queries, collector: GradientCollector) -> Measure:
    def scores(batch: Batch) -> Tensor:
        rows = collector.take().float()
        found = torch.cat([rows @ queries.flat(number).T for number in range(len(queries.slices))], dim=1)
        norms = rows.norm(dim=1) if queries.config.unit_normalize else None
        return _finished(found, norms, queries)

    return _backward(model, queries, scores)


def _by_factors(model: LanguageModel, queries: Queries, meeting: Meeting) -> Measure:
    def scores(batch: Batch) -> Tensor:
        found, squares = meeting.take()
        return _finished(found, None if squares is None else squares.sqrt(), queries)

    return _backward(model, queries, scores)


def _backward(model: LanguageModel, queries: Queries, scores: Callable[[Batch], Tensor]) -> Measure:
    plan, tokens = queries.plan, bool(queries.config.tokens)

    def measure(batch: Batch) -> RowBlock:
        losses = finite_losses(model, batch, plan)
        losses.sum().backward()
        found = scores(batch)
        if tokens:
            found = by_position(found, batch)
        return RowBlock(batch.rows, found, losses.detach(), labelled_tokens(batch))

    return measure


def _finished(scores: Tensor, norms: Tensor | None, queries: Queries) -> Tensor:
    """Cosines where unit gradients are compared, and the largest where the nearest query counts."""
    if norms is not None:
        scores = torch.where(norms[:, None] > 0, scores / norms[:, None].clamp(min=1e-30), 0)
    return _nearest(scores, queries) if queries.config.score == "nearest" else scores


def _nearest(scores: Tensor, queries: Queries) -> Tensor:
    """The largest of the last axis; queries without a gradient are near to nothing."""
    empty = torch.from_numpy(queries.empty).to(scores.device)
    return scores.masked_fill(empty, float("-inf")).amax(-1, keepdim=True)


def _by_forward_mode(model: LanguageModel, queries: Queries) -> Measure:
    if reason := _forward_mode.impossible(model, queries.plan):
        raise ModelError(f"no forward-mode derivative: {reason}. --attribute-tokens gradient needs none")

    def measure(batch: Batch) -> RowBlock:
        found, losses = [], torch.empty(0)
        for start, stop in queries.slices:
            for query in torch.from_numpy(queries.rows(start, stop)).to(batch.input_ids.device):
                tangents = _forward_mode.directions(model, queries.plan, query)
                scores, losses = _forward_mode.token_derivatives(model, batch, tangents, queries.plan)
                found.append(scores)
        stacked = torch.stack(found, dim=-1)
        if not queries.config.tokens:
            stacked = stacked.sum(1)
        if queries.config.score == "nearest":
            stacked = _nearest(stacked, queries)
        return RowBlock(batch.rows, stacked, losses, labelled_tokens(batch))

    return measure
