"""What ``trace preconditioners``, ``trace hessian`` and ``trace trackstar`` do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import AttributionError, RunError
from attribute.config import DataConfig, IndexConfig
from attribute.curvature._fit import fit_kronecker
from attribute.curvature._gram import Gram, GramSums, gram_of_store, mixing_weight
from attribute.curvature._inversion import Inversion
from attribute.curvature._kronecker import Kronecker
from attribute.curvature._sidecar import exists
from attribute.data import TokenFile, shared_source
from attribute.engine import run_pass
from attribute.index import announce, collect_gradients, tokenise
from attribute.model import LanguageModel, load_tokenizer, model_of
from attribute.normalizing import save_normalizer, shared_normalizer
from attribute.processes import current
from attribute.progress import Progress, Quiet
from attribute.run import scratch_beside
from gradcore import Identity, Spectral
from gradstore import GradientStore, ScoreStore, SearchResult

_STRETCH = 64  # neighbouring rows sampled together, so that they can share a batch


def fit_preconditioners(
    path: str | Path,
    config: IndexConfig | None = None,
    *,
    index: str | Path = "",
    joint: bool = False,
    sample: int = 10_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Gram:
    """Fit the second moment of a dataset's sketched gradients, without keeping them, or that of an index's rows.

    Args:
        path: where the sidecar goes.
        config: model, data and sketch.
        index: take the rows of this index instead; then no model is run.
        joint: one matrix over all modules instead of one a module.
        sample: at most about so many rows; 0 takes all.
        overwrite: replace a curvature that exists.
        progress: told of the pass.
    """
    _refuse_existing(path, overwrite)
    here = current()
    if index:

        def of_index() -> Gram:
            gram = gram_of_store(GradientStore.open(index), joint=joint, sample=sample)
            gram.save(path, source=str(index))
            return gram

        return here.from_first(of_index)
    config, progress = (config or IndexConfig()).two_sided(), progress or Quiet()
    if isinstance(config.sketch, Spectral):
        raise AttributionError("a spectral basis belongs to an index: build one and fit its rows (--index RUN)")
    with _opened(path, config, progress) as (model, tokens):
        plan = model.plan(config)
        announce(model, plan, progress)
        plan = replace(plan, normalizer=shared_normalizer(model, tokens, plan, config, progress))
        sums = GramSums(plan, joint=joint)
        windows = _windows(len(tokens), sample)
        total = sum(int(tokens.offsets[stop] - tokens.offsets[start]) for _, start, stop in windows)
        progress.start("gradients", total, "tokens")
        budget = config.token_batch_size
        run_pass(model, tokens, plan, windows, [sums], budget=budget, progress=progress, deal="batches")
        progress.stop()
        sums.share(here)

        def finished() -> Gram:
            gram = sums.finish()
            save_normalizer(Path(path), plan.normalizer)
            gram.save(path, config=config.to_dict(), tokens=tokens.digest, head=model.head_fingerprint())
            return gram

        return here.from_first(finished)


def fit_hessian(
    path: str | Path,
    config: IndexConfig,
    method: str = "ekfac",
    *,
    labels: str = "sampled",
    seed: int = 0,
    sample: int = 0,
    partitions: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Kronecker:
    """Fit K-FAC, EK-FAC, TK-FAC or Shampoo factors over a dataset; the arguments are those of :func:`fit_kronecker`.

    Factors are those of whole gradients unless the configuration asks for a sketch.
    """
    _refuse_existing(path, overwrite)
    progress = progress or Quiet()
    if not config.sketch_kind and config.projection_dim is None:
        config = replace(config, projection_dim=0)
    with _opened(path, config, progress) as (model, tokens):
        plan = model.plan(config)
        announce(model, plan, progress)
        found = fit_kronecker(
            model,
            tokens,
            plan,
            method,
            labels=labels,
            seed=seed,
            sample=sample,
            partitions=partitions,
            budget=config.token_batch_size,
            progress=progress,
        )
        if current().first:
            found.save(path, config=config.to_dict(), tokens=tokens.digest, head=model.head_fingerprint(), seed=seed)
    return found


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
    damping: float = 0.1,
    sample: int = 10_000,
    top_k: int = 5,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Trackstar:
    """TrackStar (Chang et al. 2024): cosines of R^-½ φ between queries and training rows, R mixed from both sides.

    The model is loaded once and runs once over either dataset: curvatures come from the stored rows, and R^-½ is
    applied to both sides in one sweep of the store. What is finished of an interrupted run is kept.

    Args:
        path: gets ``index/`` and ``queries/`` (gradient stores), ``curvature/`` (sidecar) and ``scores/``.
        config: model, training data and sketch.
        query: the query data.
        components: task directions to mark down, see :func:`mixing_weight`.
        mix: ``False`` takes the training side alone (the paper's non-task variant).
        damping: relative to each module's mean eigenvalue.
        sample: training rows that R is fitted on, at most; 0 takes all.
        top_k: rows at either end.
        overwrite: replace a run that exists.
        progress: told of each stage.

    Raises:
        AttributionError: no projection: R would be as large as the square of a weight matrix.
    """
    path, progress, config = Path(path), progress or Quiet(), config.two_sided()
    if isinstance(config.sketch, Identity | Spectral):
        raise AttributionError(
            "TrackStar needs a sketch that both sides share without a fit, since R is a dense matrix over it: "
            "--projection-dim 16 or more"
        )
    here = current()
    if here.first and (path / "scores" / "manifest.json").exists() and not overwrite:
        raise RunError(f"{path} holds a finished run already: --overwrite replaces it")
    # Both sides are scaled alike: the queries by what was taken for the training rows.
    shared = str(path / "index") if config.normalizer or config.processor_path else ""
    of_queries = replace(config, data=query, store_dtype="fp32", processor_path=shared, optimizer_state_path="")
    sides = {"index": config, "queries": of_queries}
    stores = _both_sides(path, sides, overwrite, progress)

    def finished() -> tuple[SearchResult, float]:
        scores, weight = _scored(path, stores, components, mix, damping, sample, overwrite, progress)
        return scores.top(top_k), weight

    hits, weight = here.from_first(finished)
    return Trackstar(ScoreStore.open(path / "scores"), hits, weight, stores["index"], stores["queries"])


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
    too_few = "; too few queries to tell a task by, --target-downweight-components mixes all the same"
    progress.note(f"λ = {weight:.3f} of the query side in the curvature{too_few if mix and not weight else ''}")
    inversion = Inversion("damped", damping, -0.5)
    gram.save(path / "curvature", mixing_weight=weight, inversion=inversion.to_dict())
    scores = _score(path / "scores", stores, gram, inversion, overwrite, {"mixing_weight": weight, "mix": mix})
    return scores, weight


def _both_sides(
    path: Path, sides: dict[str, IndexConfig], overwrite: bool, progress: Progress
) -> dict[str, GradientStore]:
    config = sides["index"]
    tokenizer = model = None
    stores = dict[str, GradientStore]()
    for name, each in sides.items():
        progress.note(f"gradients of the {'training rows' if name == 'index' else 'queries'}")
        if model is None:
            tokenizer = load_tokenizer(config.tokenizer or config.model, config.revision)
            model = model_of(config)
        if current().from_first(partial(_finished, path / name, each)) and not overwrite:
            stores[name] = GradientStore.open(path / name)
            continue
        stores[name] = collect_gradients(
            model,
            shared_source(each.data),
            path / name,
            tokenizer=tokenizer,
            config=each,
            overwrite=overwrite,
            progress=progress,
        )
    return stores


def _finished(path: Path, config: IndexConfig) -> bool:
    if not (path / "manifest.json").exists() or not (store := GradientStore.open(path, partial=True)).complete:
        return False
    if store.meta["config"] != json.loads(json.dumps(config.to_dict())):
        raise RunError(f"{path} was made with other options: continue with the same, or replace it with --overwrite")
    return True


def _score(
    path: Path,
    stores: dict[str, GradientStore],
    gram: Gram,
    inversion: Inversion,
    overwrite: bool,
    about: dict[str, Any],
) -> ScoreStore:
    import shutil

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


def _windows(rows: int, sample: int) -> list[tuple[int, int, int]]:
    if not sample or sample >= rows:
        return [(0, 0, rows)]
    stretches = -(-sample // _STRETCH)
    starts = np.unique(np.linspace(0, max(0, rows - _STRETCH), stretches).astype(int) // _STRETCH * _STRETCH)
    return [(number, int(start), min(int(start) + _STRETCH, rows)) for number, start in enumerate(starts)]


@contextmanager
def _opened(path: str | Path, config: IndexConfig, progress: Progress) -> Iterator[tuple[LanguageModel, TokenFile]]:
    source = shared_source(config.data)
    tokenizer = load_tokenizer(config.tokenizer or config.model, config.revision)
    model = model_of(config)
    with scratch_beside(Path(path)) as scratch:
        yield model, tokenise(scratch, source, tokenizer, config, model, progress)


def _refuse_existing(path: str | Path, overwrite: bool) -> None:
    if not current().first:
        return
    if Path(path).is_file():
        raise RunError(f"{path} is a file, not a folder")
    if exists(path) and not overwrite:
        raise RunError(f"{path} holds a curvature already: --overwrite replaces it")
