"""TrackStar in one call: what ``trace trackstar`` does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import AttributionError, RunError
from attribute.config import DataConfig, IndexConfig
from attribute.curvature._gram import Gram, gram_of_store, mixing_note, mixing_weight
from attribute.curvature._inversion import Inversion
from attribute.data import shared_source
from attribute.index import collect_gradients, tokenise
from attribute.model import LanguageModel, load_tokenizer, model_of
from attribute.normalizing import default_note, load_normalizer, state_beside
from attribute.processes import current
from attribute.progress import Progress, Quiet
from attribute.run import is_begun, require_same_inputs, require_same_options, scratch_beside
from gradcore import Identity, Spectral
from gradstore import GradientStore, ScoreStore, SearchResult

NORMALIZER = "adafactor"
"""The paper's: gradients are divided by the root of Adafactor's second moments (Chang et al. 2024, section 3)."""


@dataclass(frozen=True)
class Trackstar:
    """What :func:`trackstar` found.

    Attributes:
        scores: ``[rows, queries]`` on disk.
        hits: best and worst rows of each query.
        weight: λ of the query side in the mixed curvature.
        index, queries: the gradient stores.
    """

    scores: ScoreStore
    hits: SearchResult
    weight: float
    index: GradientStore
    queries: GradientStore

    def answer(self) -> dict[str, Any]:
        """A JSON-able form with the texts."""
        from attribute.attributor import record_text  # which imports the methods, which import this

        def listed(rows: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
            return [
                {"row": int(row), "score": float(score), "text": record_text(self.index.data(int(row)))}
                for row, score in zip(rows, scores)
            ]

        return {
            "mixing_weight": self.weight,
            "queries": [
                {
                    "query": number,
                    "text": record_text(self.queries.data(number)),
                    "proponents": listed(self.hits.top_rows[number], self.hits.top_scores[number]),
                    "opponents": listed(self.hits.bottom_rows[number], self.hits.bottom_scores[number]),
                }
                for number in range(self.queries.rows)
            ],
        }


def trackstar(
    path: str | Path,
    config: IndexConfig,
    query: DataConfig,
    *,
    components: int = 0,
    mix: bool = True,
    normalize: bool = True,
    damping: float = 0.1,
    sample: int = 10_000,
    top_k: int = 5,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Trackstar:
    """TrackStar (Chang et al. 2024): cosines of R^-½ φ between queries and training rows, R mixed from both sides.

    The model is loaded once and runs once over either dataset, and once more over a sample of the training rows where
    second moments are to be fitted: curvatures come from the stored rows, and R^-½ is applied to both sides in one
    sweep of the store. What is finished of an interrupted run is kept.

    Args:
        path: gets ``index/`` and ``queries/`` (gradient stores), ``curvature/`` (sidecar) and ``scores/``.
        config: model, training data and sketch.
        query: the query data.
        components: task directions to mark down, see :func:`mixing_weight`.
        mix: ``False`` takes the training side alone (the paper's non-task variant).
        normalize: where the configuration names no normaliser, take the paper's: see :func:`with_normaliser`.
        damping: relative to each module's mean eigenvalue.
        sample: training rows that R is fitted on, at most; 0 takes all.
        top_k: rows at either end.
        overwrite: replace a run that exists.
        progress: told of each stage.

    Raises:
        AttributionError: no projection: R would be as large as the square of a weight matrix.
        RunError: a finished run, or what there is of one was made from other data, weights or options.
    """
    path, progress, config = Path(path), progress or Quiet(), config.two_sided()
    if top_k < 1:
        raise AttributionError(f"--top-k must be at least 1, not {top_k}")
    Inversion("damped", damping)  # which refuses what is no damping before hours are spent
    if normalize:
        config = with_normaliser(config, progress)
    if isinstance(config.sketch, Identity | Spectral):
        raise AttributionError(
            "TrackStar needs a sketch that both sides share without a fit, since R is a dense matrix over it: "
            "--projection-dim 16 or more"
        )
    here = current()
    if here.first and (path / "scores" / "manifest.json").exists() and not overwrite:
        raise RunError(f"{path} holds a finished run already: --overwrite replaces it")
    sides = {"index": config, "queries": replace(config, data=query, store_dtype="fp32")}
    stores = _both_sides(path, sides, overwrite, progress)

    def finished() -> tuple[SearchResult, float]:
        scores, weight = _scored(path, stores, components, mix, damping, sample, overwrite, progress)
        return scores.top(top_k), weight

    hits, weight = here.from_first(finished)
    return Trackstar(ScoreStore.open(path / "scores"), hits, weight, stores["index"], stores["queries"])


def with_normaliser(config: IndexConfig, progress: Progress) -> IndexConfig:
    """The configuration with the paper's normaliser, unless it names one or a folder with one.

    Second moments are those of an ``optimizer.pt`` in the model's folder, if there is one, else they are fitted to the
    training rows.
    """
    if config.normalizer or config.processor_path:
        return config
    state = state_beside(config.model)
    progress.note(default_note(NORMALIZER, state))
    return replace(config, normalizer=NORMALIZER, optimizer_state_path=state)


def _scored(
    path: Path,
    stores: dict[str, GradientStore],
    components: int,
    mix: bool,
    damping: float,
    sample: int,
    overwrite: bool,
    progress: Progress,
) -> tuple[ScoreStore, float]:
    train = gram_of_store(stores["index"], sample=sample)
    gram, weight = train, 0.0
    if mix:
        of_queries = gram_of_store(stores["queries"])
        weight = mixing_weight(train, of_queries, components)
        gram = of_queries.mix(train, weight)
        progress.note(mixing_note(weight, "--target-downweight-components mixes all the same"))
    inversion = Inversion("damped", damping, -0.5)
    gram.save(path / "curvature", mixing_weight=weight, inversion=inversion.to_dict())
    scores = _score(path / "scores", stores, gram, inversion, overwrite, {"mixing_weight": weight, "mix": mix})
    return scores, weight


def _both_sides(
    path: Path, sides: dict[str, IndexConfig], overwrite: bool, progress: Progress
) -> dict[str, GradientStore]:
    config = sides["index"]
    tokenizer = load_tokenizer(config.tokenizer or config.model, config.revision)
    model = model_of(config)
    stores = dict[str, GradientStore]()
    for name, each in sides.items():
        progress.note(f"gradients of the {'training rows' if name == 'index' else 'queries'}")
        if not overwrite and _finished(path / name, each, model, tokenizer, progress):
            stores[name] = GradientStore.open(path / name)
            continue
        stores[name] = collect_gradients(
            model,
            shared_source(each.data),
            path / name,
            tokenizer=tokenizer,
            config=each,
            # Both sides are scaled alike: the queries by what was taken for the training rows.
            normalizer=None if name == "index" else current().from_first(lambda: load_normalizer(path / "index")),
            overwrite=overwrite,
            progress=progress,
        )
    return stores


def _finished(path: Path, config: IndexConfig, model: LanguageModel, tokenizer: Any, progress: Progress) -> bool:
    """Whether the gradients there are complete.

    Raises:
        RunError: they are, but of other data, weights or options.
    """
    here = current()
    if not here.from_first(lambda: is_begun(path) and GradientStore.open(path, partial=True).complete):
        return False
    with scratch_beside(path) as scratch:
        tokens = tokenise(scratch, shared_source(config.data), tokenizer, config, model, progress)
        weights = model.plan(config).model
        here.from_first(lambda: _require_same(path, config, weights, tokens.digest))
    return True


def _require_same(path: Path, config: IndexConfig, weights: str, tokens: str) -> None:
    require_same_options(path, config)
    require_same_inputs(path, config, weights=weights, tokens=tokens)
    if GradientStore.open(path).meta["config"] != json.loads(json.dumps(config.to_dict())):
        raise RunError(f"{path} was made with other options: continue with the same, or replace it with --overwrite")


def _score(
    path: Path,
    stores: dict[str, GradientStore],
    gram: Gram,
    inversion: Inversion,
    overwrite: bool,
    about: dict[str, Any],
) -> ScoreStore:
    from attribute.spectral import plan_of

    index, queries = stores["index"], stores["queries"]
    plan_of(queries).require_equal(plan_of(index), this="the queries", that="the index")
    transform = gram.transform(inversion)
    directions = unit(transform(queries.block(0, queries.rows)))
    if path.exists():  # an unfinished one, or one to replace: it is made in seconds
        shutil.rmtree(path)
    provenance = {"method": "trackstar", "inversion": inversion.to_dict(), **about}
    names = [str(number) for number in range(queries.rows)]
    identity = {"index": index.manifest.fingerprint, "queries": queries.manifest.fingerprint, **provenance}
    with ScoreStore.create(path, rows=index.rows, queries=names, plan=identity, provenance=provenance) as writer:
        for shard, start, stop in writer.pending:
            parts = [
                unit(transform(index.block(first, min(first + 2048, stop)))) @ directions.T
                for first in range(start, stop, 2048)
            ]
            writer.write(shard, np.concatenate(parts))
    return ScoreStore.open(path)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; zero stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
