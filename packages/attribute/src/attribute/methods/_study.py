"""What a method works from: a model, the rows it learned from, the queries asked of it, and what is shared between
methods, made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError
from attribute.batching import Batch, assemble, plan_batches
from attribute.curvature import Gram, Kronecker, fit_kronecker
from attribute.curvature._gram import GramSums
from attribute.data import TokenFile
from attribute.engine import (
    RowBlock,
    evaluating,
    finite_losses,
    gradients_of,
    labelled_tokens,
    run_pass,
    run_windows,
)
from attribute.meeting import Meeting
from attribute.model import LanguageModel
from attribute.normalizing import fit_moments, planned_moments
from attribute.progress import Progress, Quiet
from gradcore import IGNORE, CapturePlan, Identity, Normalizer, TwoSided


@dataclass(frozen=True)
class Checkpoint:
    """The model at one point of its training, the mean learning rate around it, and its optimiser's second moments."""

    model: LanguageModel
    learning_rate: float
    moments: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Study:
    """One model, its training rows and the queries.

    Example::

        study = Study(model, rows, queries, model.plan(IndexConfig(projection_dim=0)))
        estimator_named("ek-fac").influence(study)      # [queries, rows]

    Attributes:
        model: the trained model.
        rows, queries: token files.
        plan: which parameters count, with whole gradients.
        texts, query_texts: for lexical baselines; decoded text or any words.
        checkpoints: of the training, for the methods that follow it.
        damping: relative to each module's mean eigenvalue.
        labels, seed: of the Fisher, as for :func:`fit_kronecker`.
        projection_dim: side of the sketch of the methods that need one.
        normalizer: of sketched gradients: ``adam``, ``adafactor`` or ``shampoo``, fitted to the rows; none by default.
        moments: second moments of the optimiser, by module; without them they are fitted to the rows where needed.
        horizon: Σ of the training's learning rates, 0 where it is not known.
        batch: rows a step of the training, from which the moments follow where the optimiser's are not given.
        components: TrackStar's task directions, 0 in proportion.
        solver_rows, solver_steps: rows of the Gauss-Newton matrix and iterations, of the methods that solve with it.
        budget: padded tokens a batch.
        progress: told of each pass.
    """

    model: LanguageModel
    rows: TokenFile
    queries: TokenFile
    plan: CapturePlan
    texts: Sequence[str] = ()
    query_texts: Sequence[str] = ()
    checkpoints: Sequence[Checkpoint] = ()
    damping: float = 0.1
    labels: str = "sampled"
    seed: int = 0
    projection_dim: int = 16
    components: int = 0
    normalizer: str = ""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    horizon: float = 0.0
    batch: int = 0
    solver_rows: int = 64
    solver_steps: int = 10
    budget: int = 4096
    progress: Progress = field(default_factory=Quiet)
    _curvatures: dict[str, Kronecker] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.plan.sketch, Identity):
            raise AttributionError("a study is planned with whole gradients; methods sketch them (projection_dim)")

    @cached_property
    def query_gradients(self) -> np.ndarray:
        """Whole gradients of the queries ``[q, width]``."""
        return gradients_of(self.model, self.queries, self.plan, self.budget)

    @cached_property
    def sketched(self) -> CapturePlan:
        """The plan under a two-sided sketch, and under the normaliser that was asked for."""
        sketch = TwoSided(self.projection_dim, seed=self.seed)
        normalizer = Normalizer.of_moments(self.normalizer, self.second_moments) if self.normalizer else None
        return replace(self.plan, sketch=sketch, normalizer=normalizer)

    @cached_property
    def second_moments(self) -> dict[str, Tensor]:
        """Of Adam, by module ``[out, in]``: the optimiser's where given, else mean squared gradients of the rows."""
        if self.moments:
            return planned_moments(self.moments, self.plan)
        return fit_moments(self.model, self.rows, self.plan, budget=self.budget, progress=self.progress)

    @cached_property
    def sketches(self) -> tuple[np.ndarray, np.ndarray]:
        """Sketched gradients of the rows and of the queries."""
        return tuple(gradients_of(self.model, side, self.sketched, self.budget) for side in (self.rows, self.queries))  # type: ignore[return-value]

    def gram(self, rows: np.ndarray) -> Gram:
        """The second moment of sketched gradients, per module."""
        sums = GramSums(self.sketched)
        sums.add_rows(torch.from_numpy(rows))
        return sums.finish()

    def curvature(self, method: str) -> Kronecker:
        """The Kronecker curvature over the training rows, fitted when first asked for."""
        if method not in self._curvatures:
            self._curvatures[method] = fit_kronecker(
                self.model,
                self.rows,
                self.plan,
                method,
                labels=self.labels,
                seed=self.seed,
                budget=self.budget,
                progress=self.progress,
            )
        return self._curvatures[method]

    def visit(self, visitor: Callable[[RowBlock], None], model: LanguageModel | None = None) -> None:
        """Run one pass over the rows' whole gradients, ``[n, width]`` a block; of a checkpoint if given."""
        plan = self.plan if model is None else replace(self.plan, model="")
        windows = [(0, 0, len(self.rows))]
        with torch.enable_grad():
            run_pass(model or self.model, self.rows, plan, windows, [_Visitor(visitor)], budget=self.budget)

    def products(
        self, directions: np.ndarray, *, model: LanguageModel | None = None, unit_rows: bool = False
    ) -> np.ndarray:
        """⟨direction, gradient of row⟩ by one pass, ``[q, rows]``; with ``unit_rows`` over the norm of the row."""
        found, running = np.zeros((len(directions), len(self.rows)), dtype=np.float32), model or self.model
        right = torch.from_numpy(np.ascontiguousarray(directions, dtype=np.float32)).to(running.device)
        asked = {
            name: right[:, columns].unflatten(1, self.plan.shapes[name]) for name, columns in self.plan.slices.items()
        }
        meeting = Meeting(lambda name: [asked[name]], norms=unit_rows)
        self.progress.start("scores", int(self.rows.lengths.sum()), "tokens")

        def measure(batch: Batch) -> RowBlock:
            losses = finite_losses(running, batch, self.plan)
            losses.sum().backward()
            scores, squares = meeting.take()
            if squares is not None:
                scores = scores / squares.sqrt().clamp(min=1e-30)[:, None]
            return RowBlock(batch.rows, scores, losses.detach(), labelled_tokens(batch))

        def keep(block: RowBlock) -> None:
            found[:, block.rows] = block.gradients.T.cpu().numpy()

        windows = [(0, 0, len(self.rows))]
        with torch.enable_grad(), running.collector(self.plan, factors=meeting.receive):
            run_windows(
                running, self.rows, windows, [_Visitor(keep)], measure, budget=self.budget, progress=self.progress
            )
        self.progress.stop()
        return found

    def hidden(self, tokens: TokenFile, *, embedding: bool = False) -> np.ndarray:
        """Mean hidden state of each row's tokens ``[n, d]``, of the last layer or of the input embedding."""
        found: np.ndarray | None = None
        table = self.model.model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad(), evaluating(self.model):
            for chosen in plan_batches(tokens.lengths, np.arange(len(tokens)), self.budget):
                batch = assemble(tokens, chosen, self.model.device)
                states: Tensor = (
                    table(batch.input_ids)
                    if embedding
                    else self.model.base(input_ids=batch.input_ids, use_cache=False)[0]
                )
                lengths = torch.from_numpy(tokens.lengths[chosen]).to(states.device)
                real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
                mean = (states.float() * real[..., None]).sum(1) / lengths.clamp(min=1)[:, None]
                if found is None:
                    found = np.zeros((len(tokens), mean.shape[1]), dtype=np.float32)
                found[chosen] = mean.cpu().numpy()
        assert found is not None
        return found

    def losses(self) -> np.ndarray:
        """Summed loss of every row ``[rows]``; 0 where there is none."""
        found = np.zeros(len(self.rows), dtype=np.float32)
        with torch.no_grad(), evaluating(self.model):
            for chosen in plan_batches(self.rows.lengths, np.arange(len(self.rows)), self.budget):
                batch = assemble(self.rows, chosen, self.model.device)
                if (batch.labels[:, 1:] != IGNORE).any():
                    found[chosen] = self.model.losses(batch.input_ids, batch.labels).cpu().numpy()
        return found


class _Visitor:
    def __init__(self, visit: Callable[[RowBlock], None]) -> None:
        self._visit = visit

    def open(self, index: int, start: int, stop: int) -> None:
        """Nothing to prepare."""

    def add(self, block: RowBlock) -> None:
        """Hand the block on."""
        self._visit(block)

    def close(self) -> None:
        """Nothing to finish."""


def cosines(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``[q, d], [n, d]`` to ``[q, n]``; zero for a zero vector."""
    sides = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-30) for side in (queries, rows)]
    return (sides[0] @ sides[1].T).astype(np.float32)
