"""Scores of one method over two datasets: what ``trace method`` does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import AttributionError, DataError, RunError
from attribute.attributor import record_text
from attribute.config import DataConfig, IndexConfig
from attribute.data import TokenFile, open_source
from attribute.index import announce, records_of, tokenise
from attribute.methods import OPTIONS, Checkpoint, Estimator, Study, estimator_named, require_used
from attribute.model import LanguageModel, load_model, load_tokenizer
from attribute.normalizing import default_note, moments_of, state_beside
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
    normalize: bool = True,
    horizon: float = 0.0,
    batch: int = 0,
    group_column: str = "",
    nearest: bool = False,
    top_k: int = 5,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Influence:
    """Score every training row for every query by the method of that name.

    Args:
        path: a new folder for the scores.
        name: one of ``attribute.methods.estimators()``.
        config: model, training data and modules; of its sketch the ``projection_…`` count, for the methods that sketch.
        query: the query data.
        checkpoints: (model, learning rate) of the training, for the methods that follow it; with an ``optimizer.pt`` in
            the folder, its moments are taken.
        damping, labels, seed, solver_rows, solver_steps, batch: as for :class:`Study`.
        normalize: where the configuration names no normaliser, take the method's own, with the moments of an
            ``optimizer.pt`` in the model's folder if there is one.
        horizon: 0 takes it from the ``trainer_state.json`` beside the optimiser's state, if there is one.
        optimizer_state: an ``optimizer.pt`` or its folder, for the methods that move as Adam does and for the
            normaliser; without it moments are fitted to the rows.
        group_column: of the queries; LESS takes those of one value for a sub-task, and scores sub-tasks.
        nearest: one column, of the sub-task (or query) that a row is nearest to.
        top_k: rows at either end in the answer.
        about: more to keep with the scores.
        progress: told of each stage.

    Raises:
        RunError: the folder exists.
        AttributionError: no such method, it lacks what it needs, or has no use for a setting that is not the default.
    """
    path, progress, estimator = Path(path), progress or Quiet(), estimator_named(name)
    settings: dict[str, Any] = {
        "damping": damping,
        "labels": labels,
        "seed": seed,
        "solver_rows": solver_rows,
        "solver_steps": solver_steps,
        "horizon": horizon,
        "batch": batch,
        "nearest": nearest,
    }
    others = {"checkpoints": checkpoints, "moments": optimizer_state, "group_column": group_column}
    given = {key for key, value in settings.items() if value != getattr(Study, key)}
    given |= {key for key, value in others.items() if value} | _given(config, query)
    require_used(estimator, {key: OPTIONS[key] for key in OPTIONS if key in given})
    _require_usable(path, estimator, config, top_k)
    if optimizer_state and not horizon and "horizon" in estimator.uses:
        settings["horizon"] = horizon_of(Path(optimizer_state))
    normalizer, optimizer_state = _normaliser(estimator, config, normalize, optimizer_state, progress)
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
                projection_dim=config.projection_dim or 16,
                projection_type=config.projection_type,
                projection_seed=config.projection_seed,
                groups=_groups(beside, group_column),
                normalizer=normalizer,
                moments=moments_of(model, optimizer_state) if optimizer_state else {},
                budget=config.token_batch_size,
                progress=progress,
                **settings,
            )
            scores = estimator.influence(study)
    columns = _columns(study)
    kept = {"method": name, "config": config.to_dict(), "optimizer_state": optimizer_state, "normalizer": normalizer}
    kept |= {"weights": plan.model, "rows": rows.digest, "queries": queries.digest, **settings, **(about or {})}
    if study.groups or nearest:
        kept["columns"] = columns
    stored = _stored(path, scores, kept)
    return Influence(stored, stored.top(top_k), texts, columns)


def _require_usable(path: Path, estimator: Estimator, config: IndexConfig, top_k: int) -> None:
    """Raise where nothing could come of a run, before anything is loaded."""
    if top_k < 1:
        raise AttributionError(f"--top-k must be at least 1, not {top_k}")
    if config.projection_dim == 0 and "projection_dim" in estimator.uses:
        raise AttributionError(
            f"{estimator.name} needs a sketch: --projection-dim must be 1 or more, 0 keeps whole gradients"
        )
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise RunError(f"{path} is not empty: choose another folder for the scores")


def _normaliser(
    estimator: Estimator, config: IndexConfig, normalize: bool, state: str, progress: Progress
) -> tuple[str, str]:
    """The normaliser, by default the method's own, and the optimiser's state that its second moments are from."""
    kind = config.normalizer or (estimator.normalizer if normalize else "none")
    if state and "normalizer" in estimator.uses and kind in ("", "none"):
        raise AttributionError("--optimizer-state-path has the second moments of a normaliser: --normalizer adafactor")
    if kind and kind == estimator.normalizer and not config.normalizer:
        state = state or state_beside(config.model)
        progress.note(default_note(kind, state))
    return kind, state


def _stored(path: Path, scores: np.ndarray, kept: dict[str, Any]) -> ScoreStore:
    """Scores ``[columns, rows]`` on disk, with what they are of."""
    queries, rows = scores.shape
    names = [str(number) for number in range(queries)]
    with ScoreStore.create(path, rows=rows, queries=names, plan=kept, provenance=kept) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, np.ascontiguousarray(scores[:, start:stop].T))
    return ScoreStore.open(path)


def _side(
    scratch: Path, config: IndexConfig, data: DataConfig, model: LanguageModel, tokenizer: Any, progress: Progress
) -> tuple[TokenFile, list[str]]:
    tokens = tokenise(scratch, open_source(data), tokenizer, replace(config, data=data), model, progress)
    return tokens, [record_text(record) for record in records_of(scratch)]


def _given(config: IndexConfig, query: DataConfig) -> set[str]:
    """The settings of a configuration that are not the default."""
    plain = IndexConfig()
    found = {key for key in OPTIONS if hasattr(plain, key) and getattr(config, key) != getattr(plain, key)}
    if config.projection_dim == 0:  # whole gradients, which is what methods without a sketch work from
        found.discard("projection_dim")
    if any(data.reward_column or data.advantage_column for data in (config.data, query)):
        found.add("rewards")
    return found


def _groups(scratch: Path, column: str) -> list[str]:
    """The sub-task of each query."""
    if not column:
        return []
    records = list(records_of(scratch))
    if missing := [number for number, record in enumerate(records) if column not in record]:
        found = ", ".join(records[missing[0]])
        raise DataError(f"query {missing[0]} has no column {column!r} (--query.group-column), only {found}")
    return [str(record[column]) for record in records]


def _columns(study: Study) -> list[str]:
    """What each column of the scores is of."""
    tasks = [f"{name} ({count} queries)" for name, count in Counter(study.groups).items()]
    if study.nearest:
        return [f"nearest of {f'{len(tasks)} sub-tasks' if tasks else f'{len(study.queries)} queries'}"]
    return tasks or list(study.query_texts)


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
