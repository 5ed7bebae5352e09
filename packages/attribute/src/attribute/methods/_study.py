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
from attribute.curvature import Gram, Inversion, Kronecker, fit_kronecker
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
        projection_dim, projection_type, projection_seed: side, entries and seed of the sketch of the methods that need
            one.
        normalizer: of sketched gradients: ``adam``, ``adafactor`` or ``shampoo``, from ``moments`` or fitted to the
            rows; ``none``, or by default the method's own.
        moments: second moments of the optimiser, by module; without them they are fitted to the rows where needed.
        horizon: Σ of the training's learning rates, 0 where it is not known.
        batch: rows a step of the training, from which the moments follow where the optimiser's are not given.
        groups: the sub-task of each query, for LESS; by default every query is one.
        nearest: LESS scores a row by the sub-task it is nearest to, in a single column.
        components: TrackStar's task directions, 0 in proportion.
        solver_rows, solver_steps: rows of the Gauss-Newton matrix and iterations, of the methods that solve with it.
        budget: padded tokens a batch.
        progress: told of each pass.

    Raises:
        AttributionError: a number out of range, or a plan that sketches.
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
    projection_type: str = "rademacher"
    projection_seed: int = 0
    groups: Sequence[str] = ()
    nearest: bool = False
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
        if self.groups and len(self.groups) != len(self.queries):
            raise AttributionError(f"{len(self.groups)} sub-tasks are given for {len(self.queries)} queries: one each")
        Inversion("damped", self.damping)
        _require_least("projection-dim", self.projection_dim, 1)
        _require_least("solver-rows", self.solver_rows, 0)
        _require_least("solver-steps", self.solver_steps, 0)
        _require_least("seed", self.seed, 0)
        _require_least("projection-seed", self.projection_seed, 0)
        _require_least("train-batch-size", self.batch, 0)
        _require_least("horizon", self.horizon, 0)
        for checkpoint in self.checkpoints:
            if not 0 < checkpoint.learning_rate < float("inf"):
                raise AttributionError(
                    f"the learning rate of a --checkpoint must be positive, not {checkpoint.learning_rate}"
                )

    @cached_property
    def query_gradients(self) -> np.ndarray:
        """Whole gradients of the queries ``[q, width]``."""
        return gradients_of(self.model, self.queries, self.plan, self.budget)

    @cached_property
    def sketched(self) -> CapturePlan:
        """The plan under a two-sided sketch, and under the normaliser that was asked for."""
        none = self.normalizer in ("", "none")
        normalizer = None if none else Normalizer.of_moments(self.normalizer, self.second_moments)
        return replace(self.plan, sketch=self.sketch(), normalizer=normalizer)

    def sketch(self, number: int = 0) -> TwoSided:
        """The sketch, or for a ``number`` another one of the same size."""
        return TwoSided(self.projection_dim, self.projection_type, self.projection_seed + number)

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
        """Loss of every row ``[rows]``, reduced as planned; 0 where there is none."""
        found = np.zeros(len(self.rows), dtype=np.float32)
        with torch.no_grad(), evaluating(self.model):
            for chosen in plan_batches(self.rows.lengths, np.arange(len(self.rows)), self.budget):
                batch = assemble(self.rows, chosen, self.model.device)
                if (batch.labels[:, 1:] != IGNORE).any():
                    found[chosen] = self.model.losses(batch.input_ids, batch.labels, self.plan.reduction).cpu().numpy()
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


def _require_least(option: str, value: float, least: int) -> None:
    if not least <= value < float("inf"):
        raise AttributionError(f"--{option} must be at least {least}, not {value}")


def cosines(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``[q, d], [n, d]`` to ``[q, n]``; zero for a zero vector."""
    sides = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-30) for side in (queries, rows)]
    return (sides[0] @ sides[1].T).astype(np.float32)
