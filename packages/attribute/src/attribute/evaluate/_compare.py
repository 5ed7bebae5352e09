"""All methods against one ground truth, baselines always in the same table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import AttributionError
from attribute.config import DataConfig, IndexConfig
from attribute.evaluate._lds import linear_datamodelling_score, noise_ceiling
from attribute.evaluate._truth import QUERIES, TRAIN, GroundTruth, training_of
from attribute.influence import run_method
from attribute.progress import Progress
from gradstore import ScoreStore

BASELINES = ("bm25", "loss", "length")


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
        truth: the folder of :class:`GroundTruth`; scores of methods are kept in its ``scores/`` and found again.
        runs: name → folder of scores.
        methods: names of ``attribute.methods.estimators()`` to be run.
        baselines: BM25, loss, length and random beside.
        modules: of the methods that are run; ``*`` takes every parameter.
        progress: told of each method.

    Returns:
        Rows ``{"method", bank: {"mean", "low", "high"}, …}``, and the title of each bank.

    Raises:
        AttributionError: nothing to judge.
        DataError: scores of other queries or rows.
    """
    found = GroundTruth.open(truth)
    scores = collect_scores(truth, runs, (*methods, *(BASELINES if baselines else ())), modules, progress)
    if baselines:
        scores["random"] = np.random.default_rng(0).normal(size=(len(found.base), found.rows))
    table: list[dict[str, Any]] = []
    for name, each in scores.items():
        found.require_shape(each, name)
        results = [linear_datamodelling_score(bank, found.base, each) for bank in found.banks.values()]
        table.append({"method": name, **{result.bank: asdict(result.score) for result in results}})
    ceilings = {name: noise_ceiling(bank, found.base) for name, bank in found.banks.items()}
    if all(ceilings.values()):
        table.append({"method": "noise ceiling", **{n: asdict(each.score) for n, each in ceilings.items() if each}})
    first = next(iter(found.banks))
    table.sort(key=lambda row: -row[first]["mean"])
    return table, {name: f"{bank.dropped:.0%} dropped" for name, bank in found.banks.items()}


def collect_scores(
    truth: str | Path,
    runs: Mapping[str, str | Path] | None = None,
    methods: Sequence[str] = (),
    modules: Sequence[str] = ("*",),
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Scores ``[queries, rows]`` of runs, and of methods run on the trained model of a ground truth, kept beside it.

    Raises:
        AttributionError: neither runs nor methods.
    """
    scores = {name: scores_of(path) for name, path in (runs or {}).items()}
    for name in dict.fromkeys(methods):
        kept = Path(truth) / "scores" / name
        if not (kept / "manifest.json").exists():
            train, queries = (DataConfig(dataset=str(Path(truth) / side)) for side in (TRAIN, QUERIES))
            everything = tuple(modules) == ("*",)
            config = IndexConfig(model=str(truth), modules=tuple(modules), include_bias=everything, data=train)
            training = training_of(Path(truth), GroundTruth.open(truth).rows)
            run_method(kept, name, config, queries, **training, progress=progress)
        scores[name] = scores_of(kept)
    if not scores:
        raise AttributionError("nothing to judge: --scores RUN or --method NAME")
    return scores


def scores_of(path: str | Path) -> np.ndarray:
    """Scores of a run folder of ``trace score``, ``method`` or ``trackstar``, ``[queries, rows]``."""
    folder = Path(path)
    folder = folder / "scores" if (folder / "scores" / "manifest.json").exists() else folder
    scores = ScoreStore.open(folder)
    return scores.block(0, scores.store.rows).T
