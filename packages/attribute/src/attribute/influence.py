"""Scores of one method over two datasets: what ``trace method`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import RunError
from attribute.attributor import record_text
from attribute.config import DataConfig, IndexConfig
from attribute.data import TokenFile, open_source
from attribute.index import announce, records_of, tokenise
from attribute.methods import Checkpoint, Study, estimator_named
from attribute.model import LanguageModel, load_model, load_tokenizer
from attribute.normalizing import moments_of
from attribute.progress import Progress, Quiet
from attribute.run import scratch_beside
from gradstore import ScoreStore, SearchResult


@dataclass(frozen=True)
class Influence:
    """Scores on disk, with the texts of both sides."""

    scores: ScoreStore
    hits: SearchResult
    texts: Sequence[str]
    query_texts: Sequence[str]

    def answer(self) -> dict[str, Any]:
        """A JSON-able form: proponents and opponents of every query."""

        def listed(rows: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
            return [{"row": int(r), "score": float(s), "text": self.texts[int(r)]} for r, s in zip(rows, scores)]

        hits = self.hits
        return {
            "queries": [
                {
                    "query": number,
                    "text": text,
                    "proponents": listed(hits.top_rows[number], hits.top_scores[number]),
                    "opponents": listed(hits.bottom_rows[number], hits.bottom_scores[number]),
                }
                for number, text in enumerate(self.query_texts)
            ]
        }


def run_method(
    path: str | Path,
    name: str,
    config: IndexConfig,
    query: DataConfig,
    *,
    checkpoints: Sequence[tuple[str, float]] = (),
    damping: float = 0.1,
    labels: str = "sampled",
    seed: int = 0,
    solver_rows: int = 64,
    solver_steps: int = 10,
    optimizer_state: str = "",
    horizon: float = 0.0,
    batch: int = 0,
    top_k: int = 5,
    progress: Progress | None = None,
) -> Influence:
    """Score every training row for every query by the method of that name.

    Args:
        path: a new folder for the scores.
        name: one of ``attribute.methods.estimators()``.
        config: model, training data and modules; ``projection_dim`` is the side of the methods that sketch.
        query: the query data.
        checkpoints: (model, learning rate) of the training, for the methods that follow it; with an ``optimizer.pt`` in
            the folder, its moments are taken.
        damping, labels, seed, solver_rows, solver_steps, batch: as for :class:`Study`.
        horizon: 0 takes it from the ``trainer_state.json`` beside the optimiser's state, if there is one.
        optimizer_state: an ``optimizer.pt`` or its folder, for the methods that move as Adam does and for the
            normaliser; without it moments are fitted to the rows.
        top_k: rows at either end in the answer.
        progress: told of each stage.

    Raises:
        RunError: the folder exists.
        AttributionError: no such method, or it lacks what it needs.
    """
    path, progress = Path(path), progress or Quiet()
    if optimizer_state and not horizon:
        horizon = horizon_of(Path(optimizer_state))
    estimator = estimator_named(name)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise RunError(f"{path} is not empty: choose another folder for the scores")
    tokenizer = load_tokenizer(config.tokenizer or config.model, config.revision)
    model = _load(config.model, config)
    with scratch_beside(path) as scratch:
        rows, texts = _side(scratch, config, config.data, model, tokenizer, progress)
        # The scratch folder is the rows' own; the queries have another beside it.
        with scratch_beside(path.with_name(path.name + ".queries")) as beside:
            queries, query_texts = _side(beside, config, query, model, tokenizer, progress)
            plan = model.plan(replace(config, projection_dim=0))
            announce(model, plan, progress)
            study = Study(
                model,
                rows,
                queries,
                plan,
                texts,
                query_texts,
                [_checkpoint(folder, rate, config) for folder, rate in checkpoints],
                damping=damping,
                labels=labels,
                seed=seed,
                solver_rows=solver_rows,
                solver_steps=solver_steps,
                projection_dim=config.projection_dim or 16,
                normalizer=config.normalizer,
                moments=moments_of(model, optimizer_state) if optimizer_state else {},
                horizon=horizon,
                batch=batch,
                budget=config.token_batch_size,
                progress=progress,
            )
            scores = estimator.influence(study)
    names = [str(number) for number in range(len(query_texts))]
    about = {"method": name, "config": config.to_dict(), "damping": damping, "labels": labels, "seed": seed}
    about |= {
        "solver_rows": solver_rows,
        "solver_steps": solver_steps,
        "optimizer_state": optimizer_state,
        "horizon": horizon,
        "batch": batch,
    }
    with ScoreStore.create(path, rows=len(texts), queries=names, plan=about, provenance=about) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, np.ascontiguousarray(scores[:, start:stop].T))
    stored = ScoreStore.open(path)
    return Influence(stored, stored.top(top_k), texts, query_texts)


def _side(
    scratch: Path, config: IndexConfig, data: DataConfig, model: LanguageModel, tokenizer: Any, progress: Progress
) -> tuple[TokenFile, list[str]]:
    tokens = tokenise(scratch, open_source(data), tokenizer, replace(config, data=data), model, progress)
    return tokens, [record_text(record) for record in records_of(scratch)]


def horizon_of(state: Path) -> float:
    """Σ of the learning rates of a Trainer's run up to a checkpoint, from what it logged; 0 where it logged none."""
    file = (state if state.is_dir() else state.parent) / "trainer_state.json"
    if not file.is_file():
        return 0.0
    told = json.loads(file.read_text())
    logged = [(each["step"], each["learning_rate"]) for each in told["log_history"] if "learning_rate" in each]
    if not logged:
        return 0.0
    steps, rates = (np.array(side, dtype=np.float64) for side in zip(*logged))
    return float(np.interp(np.arange(1, told["global_step"] + 1), steps, rates).sum())


def _checkpoint(folder: str, rate: float, config: IndexConfig) -> Checkpoint:
    model, state = _load(folder, config), Path(folder) / "optimizer.pt"
    return Checkpoint(model, rate, moments_of(model, state) if state.is_file() else {})


def _load(name: str, config: IndexConfig) -> LanguageModel:
    return load_model(name, precision=config.precision, device=config.device, revision=config.revision)
