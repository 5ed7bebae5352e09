"""All methods against one ground truth, baselines always in the same table."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import AttributionError, DataError
from attribute.config import DataConfig, IndexConfig
from attribute.evaluate._lds import linear_datamodelling_score, noise_ceiling
from attribute.evaluate._truth import QUERIES, TRAIN, WEIGHT, GroundTruth, training_of
from attribute.influence import run_method
from attribute.methods import estimator_named
from attribute.progress import Progress
from gradstore import GradStoreError, ScoreStore

BASELINES = ("bm25", "loss", "length")
_OF_A_MODEL = (".safetensors", ".bin")


def compare_methods(
    truth: str | Path,
    runs: Mapping[str, str | Path] | None = None,
    methods: Sequence[str] = (),
    *,
    baselines: bool = True,
    modules: Sequence[str] = ("*",),
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """LDS of scores that exist and of methods that are run, best first.

    Example::

        table, titles = compare_methods("runs/truth", {"mine": "runs/scores"}, ["ek-fac"])
        table[0]["method"], table[0]["50"]["mean"]

    Args:
        truth: the folder of :class:`GroundTruth`; scores of methods are kept in its ``scores/`` and found again, as
            long as model, rows and settings are the same. Queries whose loss no retraining changed are left out.
        runs: name → folder of scores.
        methods: names of ``attribute.methods.estimators()`` to be run.
        baselines: BM25, loss, length and random beside.
        modules: of the methods that are run; ``*`` takes every parameter.
        progress: told of each method.

    Returns:
        Rows ``{"method", bank: {"mean", "low", "high"}, …}``, and the title of each bank.

    Raises:
        AttributionError: nothing to judge.
        DataError: scores of other queries or rows; no query that any retraining changed.
    """
    found = GroundTruth.open(truth)
    moved = found.moved
    if not moved.any():
        raise DataError(f"no retraining in {truth} changed the loss of any query: nothing can be compared")
    if progress is not None and not moved.all():
        left = ", ".join(map(str, np.flatnonzero(~moved)))
        progress.note(f"left out: {left} of the queries, whose loss no retraining changed (no token with a loss?)")
    scores = collect_scores(truth, runs, (*methods, *(BASELINES if baselines else ())), modules, progress)
    if baselines:
        scores["random"] = np.random.default_rng(0).normal(size=(len(found.base), found.rows))
    table: list[dict[str, Any]] = []
    banks = {name: bank.of_queries(moved) for name, bank in found.banks.items()}
    for name, each in scores.items():
        found.require_shape(each, name)
        results = [linear_datamodelling_score(bank, found.base[moved], each[moved]) for bank in banks.values()]
        table.append({"method": name, **{result.bank: asdict(result.score) for result in results}})
    ceilings = {name: noise_ceiling(bank, found.base[moved]) for name, bank in banks.items()}
    if all(ceilings.values()):
        table.append({"method": "noise ceiling", **{n: asdict(each.score) for n, each in ceilings.items() if each}})
    first = next(iter(found.banks))
    table.sort(key=lambda row: -row[first]["mean"])
    return table, {name: f"{100 * bank.dropped:.3g}% dropped" for name, bank in found.banks.items()}


def collect_scores(
    truth: str | Path,
    runs: Mapping[str, str | Path] | None = None,
    methods: Sequence[str] = (),
    modules: Sequence[str] = ("*",),
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Scores ``[queries, rows]`` of runs, and of methods run on the trained model of a ground truth, kept beside it.

    Kept are those of all parameters in ``scores/NAME``, those of some modules in ``scores/NAME-…``. What was kept of
    another model, other rows or by other settings is made again.

    Raises:
        AttributionError: neither runs nor methods.
    """
    scores = {name: scores_of(path) for name, path in (runs or {}).items()}
    digest = _digest(Path(truth)) if methods else ""
    for name in dict.fromkeys(methods):
        scores[name] = scores_of(_kept(GroundTruth.open(truth), name, tuple(modules), digest, progress))
    if not scores:
        raise AttributionError("nothing to judge: --scores RUN or --method NAME")
    return scores


def _kept(truth: GroundTruth, name: str, modules: tuple[str, ...], digest: str, progress: Progress | None) -> Path:
    """The folder of a method's scores, which are made unless they are there."""
    uses = estimator_named(name).uses
    some = modules if "modules" in uses and modules != ("*",) else ()
    config = IndexConfig(model=str(truth.path), data=DataConfig(dataset=str(truth.path / TRAIN)))
    if "modules" in uses:
        config = replace(config, modules=modules, include_bias=not some)
    if "rewards" in uses and truth.weighted:
        config = replace(config, data=replace(config.data, advantage_column=WEIGHT))
    training = {key: value for key, value in training_of(truth.path, truth.rows).items() if key in uses}
    asked = {"truth": digest, "settings": {"modules": list(modules) if "modules" in uses else [], **training}}
    suffix = f"-{hashlib.sha256(json.dumps(some).encode()).hexdigest()[:8]}" if some else ""
    folder = truth.path / "scores" / f"{name}{suffix}"
    if _asked_for(folder) == asked:
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    queries = DataConfig(dataset=str(truth.path / QUERIES))
    run_method(folder, name, config, queries, **training, about={"asked": asked}, progress=progress)
    return folder


def _asked_for(folder: Path) -> Any:
    """What scores that were kept are of; none where they are not complete."""
    if not (folder / "manifest.json").exists():
        return None
    try:
        return ScoreStore.open(folder).provenance.get("asked")
    except GradStoreError:
        return None


def _digest(truth: Path) -> str:
    """Hash of the trained model, its rows and its queries."""
    total = hashlib.sha256()
    for file in sorted(truth.iterdir()):
        if file.name in (TRAIN, QUERIES) or file.suffix in _OF_A_MODEL:
            with file.open("rb") as stream:
                total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def scores_of(path: str | Path) -> np.ndarray:
    """Scores of a run folder of ``trace score``, ``method`` or ``trackstar``, ``[queries, rows]``."""
    folder = Path(path)
    folder = folder / "scores" if (folder / "scores" / "manifest.json").exists() else folder
    scores = ScoreStore.open(folder)
    return scores.block(0, scores.store.rows).T
