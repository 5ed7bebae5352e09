"""Factor pairs of every module, batch by batch; those of a two-sided sketch are of the sketched sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError, ModelError
from attribute.batching import Batch, assemble, plan_batches
from attribute.curvature._labels import LABELS, losses_under
from attribute.data import TokenFile
from attribute.engine import evaluating, keep_step, padded
from attribute.model import LanguageModel
from attribute.processes import current
from attribute.progress import Progress, Quiet, scaled
from gradcore import IGNORE, CapturePlan, ModuleGradient


@dataclass(frozen=True)
class Factors:
    """One module's part in one batch.

    Attributes:
        name: the module.
        out: ``[n, s, out]``, or for a looked-up table the ids ``[n, s]`` (−1: none). A table that also is the output
            embedding has ``2s`` positions, of either use, and its looked-up side written out.
        given: ``[n, s, in]``.
        positions: which of the ``n·s`` positions can reach a loss, as flat indices.
        table: the one-hot vectors that ``out`` are the ids of.
    """

    name: str
    out: Tensor
    given: Tensor
    positions: Tensor
    table: Any = None

    @property
    def looked_up(self) -> bool:
        """Whether ``out`` is ids."""
        return not self.out.is_floating_point()

    def flat_out(self) -> Tensor:
        """``[t, out]`` (ids ``[t]``) of the positions that count."""
        return self.out.flatten(0, 1).index_select(0, self.positions)

    def flat_given(self) -> Tensor:
        """``[t, in]`` of the positions that count."""
        return self.given.flatten(0, 1).index_select(0, self.positions)


OnFactors = Callable[[Factors], None]
OnVector = Callable[[str, Tensor], None]


class _State:
    """What the batch at hand is: set before its backward pass."""

    def __init__(self) -> None:
        self.mask = torch.empty(0)
        self.all = torch.empty(0)
        self.seen = set[str]()
        self.routed = frozenset[str]()
        self.held = dict[str, list[ModuleGradient]]()
        self.idle = False

    def begin(self, labels: Tensor) -> None:
        """Positions before the last labelled token can change a loss; those after it and the padding cannot."""
        width = labels.shape[1]
        places = torch.arange(width, device=labels.device)
        last = torch.where(labels[:, 1:] != IGNORE, places[1:], 0).amax(1)
        self.mask = places < last[:, None]
        self.all = self.mask.flatten().nonzero().flatten()
        self.seen.clear()
        self.held.clear()

    def complete(self, gradient: ModuleGradient, uses: int) -> ModuleGradient | None:
        """The gradient of a weight with so many uses in a forward pass, when the last of them has come."""
        parts = self.held.setdefault(gradient.name, [])
        parts.append(gradient)
        if len(parts) < uses:
            return None
        self.once(gradient.name)
        return ModuleGradient.joined(self.held.pop(gradient.name))

    def once(self, name: str) -> None:
        if name in self.seen:
            raise ModelError(
                f"{name} runs more than once in a forward pass: its curvature has no single pair of factors"
            )
        self.seen.add(name)

    def positions(self, name: str, given: Tensor, out: Tensor | None) -> Tensor:
        if name in self.routed:
            # An expert's tokens stand packed to the left: those that can reach a loss have a gradient.
            assert out is not None
            return out.flatten(0, 1).any(1).nonzero().flatten()
        n, s = self.mask.shape
        if len(given) == n and given.shape[1] and given.shape[1] % s == 0:
            uses = given.shape[1] // s
            return self.all if uses == 1 else self.mask.repeat(1, uses).flatten().nonzero().flatten()
        if len(given) != len(self.mask):
            raise ModelError(
                f"{name} saw {len(given)} rows in a batch of {len(self.mask)}: it has no gradient of each. A position "
                "table must be captured together with the token embedding before it"
            )
        return torch.arange(given.shape[0] * given.shape[1], device=given.device)


@contextmanager
def _handing(model: LanguageModel, plan: CapturePlan, on_factors: OnFactors, on_vector: OnVector) -> Iterator[_State]:
    if plan.normalizer is not None and not plan.normalizer.factored:
        raise AttributionError(
            f"gradients under the normaliser {plan.normalizer.kind}, which scales every entry, have no Kronecker "
            "factors: take adafactor, or none"
        )
    if not plan.sketch.bilinear:
        raise AttributionError(
            f"Kronecker factors need whole gradients or a two-sided sketch, not a {plan.sketch.kind} sketch"
        )
    state = _State()
    state.routed = frozenset(each.name for each in plan.modules if each.expert is not None)

    uses = {each.name: 1 + len(each.tied) for each in plan.modules}

    def hand(part: ModuleGradient) -> None:
        if state.idle:
            return None
        gradient = state.complete(part, uses[part.name])
        if gradient is None:
            return None
        if gradient.into is None:
            return on_vector(gradient.name, gradient.dense().flatten(1))
        given, out = _exact(gradient.into), gradient.out
        positions = state.positions(gradient.name, given, out if isinstance(out, Tensor) else None)
        if isinstance(out, Tensor):
            return on_factors(Factors(gradient.name, _exact(out), given, positions))
        assert out is not None
        return on_factors(Factors(gradient.name, out.ids, given, positions, out))

    with evaluating(model), model.collector(plan, factors=hand):
        yield state


def factor_pass(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    rows: Sequence[int] | np.ndarray,
    on_factors: OnFactors,
    on_vector: OnVector,
    *,
    labels: str = "sampled",
    seed: int = 0,
    budget: int = 4096,
    progress: Progress | None = None,
) -> None:
    """Hand over the factors of the rows; the rows must have a loss. Several processes share the batches out.

    Args:
        model, tokens, plan: as for :func:`attribute.engine.run_pass`.
        rows: which.
        on_factors: called for each matrix module of each batch, during the backward pass.
        on_vector: called as ``(name, [n, floats])`` for each vector layer.
        labels: ``sampled`` from the model's own distribution (true Fisher), or ``dataset`` (empirical Fisher).
        seed: of the sampling; the draw of a token depends on its row and place, never on the batch.
        budget: padded tokens a batch.
        progress: advanced by tokens.
    """
    if labels not in LABELS:
        raise AttributionError(f"--labels must be one of {', '.join(LABELS)}, not {labels!r}")
    progress = progress or Quiet()
    with torch.enable_grad(), _handing(model, plan, on_factors, on_vector) as state:

        def run(batch: Batch) -> None:
            state.idle = batch.idle
            state.begin(batch.labels)
            losses_under(model, batch, labels, seed, plan).sum().backward()

        batches = plan_batches(tokens.lengths, np.asarray(rows), budget)
        mine = [batches[place] for place in current().deal([padded(tokens, some) for some in batches])]
        part, whole = (sum(int(tokens.lengths[some].sum()) for some in each) for each in (mine, batches))
        advance = scaled(progress.advance, part, whole)
        for chosen in mine:
            run(assemble(tokens, chosen, model.device))
            advance(int(tokens.lengths[chosen].sum()))
        keep_step(model, tokens, len(mine), run)


def rows_with_loss(tokens: TokenFile, sample: int = 0) -> np.ndarray:
    """Rows with at least one loss, at most ``sample`` of them, evenly spaced; 0 takes all."""
    rows = np.array([row for row in range(len(tokens)) if tokens.labelled(row)[1:].any()], dtype=np.int64)
    if not len(rows):
        raise AttributionError("no row has a token with a loss: there is no curvature to fit")
    if sample and sample < len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, sample).round().astype(int)]
    return rows


def _exact(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
