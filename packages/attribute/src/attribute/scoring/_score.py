"""One pass over a dataset against query gradients: what ``trace score`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from attribute._errors import RunError
from attribute._shared_writer import shared_writer
from attribute.attributor import record_text, require_same_weights
from attribute.config import IndexConfig
from attribute.data import Source, TokenFile, shared_source
from attribute.engine import MatrixSink, document_windows, run_windows
from attribute.index import records_of, source_of, tokenise
from attribute.model import LanguageModel, load_tokenizer, model_of
from attribute.processes import current
from attribute.progress import Progress, Quiet
from attribute.run import is_begun, refuse_finished, remove_run, scratch_beside
from attribute.scoring._config import ScoreConfig
from attribute.scoring._measure import measuring
from attribute.scoring._queries import Queries, require_whole
from attribute.scoring._routes import Plan, plan_routes
from gradcore import Identity, Sketch, TwoSided
from gradstore import GradientStore, ScoreStore, SearchResult, StoreWriter

_UNSAID = IndexConfig.precision
"""The default, which nobody need mean: queries of another precision would never meet it."""


@dataclass(frozen=True)
class Scored:
    """Scores on disk, and the rows (or tokens) at either end.

    Attributes:
        scores: ``[rows, columns]``; of tokens, a row a token.
        hits: best and worst of each column.
        texts: shown row → its text; of tokens, with the token.
        query_texts: of the columns.
        route: how they were computed.
    """

    scores: ScoreStore
    hits: SearchResult
    texts: dict[int, str]
    query_texts: list[str]
    route: str

    def answer(self) -> dict[str, Any]:
        """A JSON-able form: proponents and opponents of every column."""

        def listed(rows: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
            return [{"row": int(r), "score": float(s), "text": self.texts[int(r)]} for r, s in zip(rows, scores)]

        hits = self.hits
        return {
            "route": self.route,
            "queries": [
                {
                    "query": number,
                    "text": text,
                    "proponents": listed(hits.top_rows[number], hits.top_scores[number]),
                    "opponents": listed(hits.bottom_rows[number], hits.bottom_scores[number]),
                }
                for number, text in enumerate(self.query_texts)
            ],
        }


def score_dataset(
    path: str | Path,
    score: ScoreConfig,
    config: IndexConfig | None = None,
    *,
    model: nn.Module | LanguageModel | None = None,
    data: Source | Any = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_begun: Callable[[], None] | None = None,
) -> Scored:
    """Score every row of a dataset against query gradients, keeping nothing on disk but the scores.

    Example::

        found = score_dataset("runs/scores", ScoreConfig("runs/query", score="mean"), IndexConfig(data=texts))
        found.scores.block(0, 10)       # [10, columns]

    An interrupted run is continued by the same call; finished blocks of rows are kept.

    Args:
        path: the run folder.
        score: the queries, and what is made of their scores.
        config: model, data and batching. What is captured, sketched and normalised the queries decide, and the model,
            too, where none is named.
        model, data, tokenizer: what the configuration names, where you have it already.
        overwrite: replace a run that exists.
        progress: told of each stage, and of the route that was chosen.
        on_begun: called once the run folder is there and before the first score.

    Returns:
        Scores, positive where training on the row lowers the query's loss.

    Raises:
        RunError: other weights than those the queries were made with; a query without direction.
        AttributionError: a route that does not exist for these queries.
        DataError, ModelError: see :func:`open_source` and :func:`load_model`.
    """
    progress, path, here = progress or Quiet(), Path(path), current()
    refuse_finished(path, overwrite)
    config = _as_the_queries(score.query_path, config or IndexConfig(), progress)
    queries = Queries(score, progress)
    if score.query_rank or score.tokens == "output":
        require_whole(queries)
    source = shared_source(config.data) if data is None else data if isinstance(data, Source) else source_of(data)
    if model is None:
        tokenizer = tokenizer or load_tokenizer(config.tokenizer or config.model, config.revision)
        model = model_of(config)
    loaded = model if isinstance(model, LanguageModel) else LanguageModel.wrap(model)
    queries.move_to(loaded.device)
    _require_same_model(queries, loaded, score.query_path, config.precision)
    if score.query_rank:
        progress.note(f"rank {score.query_rank} keeps at least {queries.kept:.1%} of the squared norm of each query")
    if queries.empty.any():
        progress.note(f"{queries.empty.sum()} of {len(queries.empty)} queries have no gradient: they count for nothing")
    if len(queries.slices) > 1:
        progress.note(f"{len(queries)} queries in {len(queries.slices)} slices, read again for each batch")
    with scratch_beside(path) as scratch:
        tokens = tokenise(scratch, source, tokenizer, config, loaded, progress)
        plan = plan_routes(queries, loaded, max(1, round(tokens.total / max(len(tokens), 1))))
        progress.note(f"route: {plan}")
        if overwrite and here.first:
            remove_run(path)

        @contextmanager
        def begin() -> Iterator[StoreWriter]:
            with _writer(path, tokens, queries, config, loaded, plan) as writer:
                if on_begun is not None:
                    on_begun()
                yield writer

        with shared_writer(path, begin) as (writer, pending):
            _run(writer, pending, loaded, tokens, queries, config, progress, plan)
        scores = ScoreStore.open(path)
        hits = here.from_first(lambda: scores.top(score.top_k))
        texts = here.from_first(lambda: _texts(scores, hits, records_of(scratch), tokens, tokenizer))
    return Scored(scores, hits, texts, queries.texts, str(plan))


def _as_the_queries(path: str, config: IndexConfig, progress: Progress) -> IndexConfig:
    """The configuration the queries were made with, over this run's model, data and batching."""
    if not Path(path).is_dir():
        raise RunError(f"there is no folder {path!r}: trace reduce or trace build makes queries")
    saved = GradientStore.open(path).meta
    if not isinstance(saved, dict) or "config" not in saved:
        raise RunError(f"{path} holds no queries: they come from trace reduce or trace build")
    made = IndexConfig.from_dict(saved["config"])
    if config.projection_dim is not None and config.sketch != made.sketch:
        _require_as_fine(path, made.sketch, config.projection_dim)
        progress.note(f"the queries decide the sketch, not --projection-dim {config.projection_dim}: {made.sketch}")
    if config.precision not in (_UNSAID, made.precision) and "auto" not in (config.precision, made.precision):
        raise RunError(
            f"{path} has gradients of the model in {made.precision}, --precision {config.precision} makes other "
            "weights of it: leave it away, the queries decide"
        )
    return replace(
        made,
        model=config.model or made.model,
        revision=config.revision if config.model else made.revision,
        tokenizer=config.tokenizer or (made.tokenizer if not config.model else ""),
        precision=made.precision if config.precision == _UNSAID else config.precision,
        device=config.device,
        fsdp=config.fsdp,
        token_batch_size=config.token_batch_size,
        rows_per_shard=config.rows_per_shard,
        data=config.data,
    )


def _require_as_fine(path: str, sketch: Sketch, side: int) -> None:
    """Raise where queries keep less of a gradient than a two-sided sketch of this side, 0 being all of it, would."""
    if isinstance(sketch, Identity):
        return
    kept = sketch.side**2 if isinstance(sketch, TwoSided) else getattr(sketch, "floats", 0)
    if not side or sketch.summed or kept < side**2:
        wanted = f"{side**2} floats a module" if side else "whole gradients"
        raise RunError(
            f"{path} has queries of {sketch}, --projection-dim {side} asks for {wanted}: the queries decide, leave it "
            "away or make them again"
        )


def _require_same_model(queries: Queries, model: LanguageModel, path: str, precision: str) -> None:
    try:
        require_same_weights(queries.plan, model.base, path, model.outside, fingerprint=model.known[0])
    except RunError as error:
        made = queries.store.meta["config"]["precision"]
        why = f" (the queries are of the model in {made}, this is it in {precision})" if made != precision else ""
        raise RunError(f"{error}{why}") from error
    if queries.store.plan["head"] != model.head_fingerprint():
        raise RunError(f"{path} was made with another output embedding than {model.name!r} has: its gradients differ")


def _writer(
    path: Path, tokens: TokenFile, queries: Queries, config: IndexConfig, model: LanguageModel, plan: Plan
) -> StoreWriter:
    score = queries.config
    # Where the queries lie is no part of what they are.
    chosen = {
        name: value for name, value in score.to_dict().items() if name not in ("query_path", "top_k", "query_rows")
    }
    identity = {
        "capture": queries.plan.to_dict(),
        "head": model.head_fingerprint(),
        "tokens": tokens.digest,
        "token_batch_size": config.token_batch_size,
        "queries": queries.store.manifest.fingerprint,
        "score": chosen,
    }
    if is_begun(path):
        return StoreWriter.resume(path, plan=identity)
    return ScoreStore.create(
        path,
        rows=tokens.total if score.tokens else len(tokens),
        queries=queries.names,
        plan=identity,
        provenance={"config": config.to_dict(), "score": score.to_dict(), "route": str(plan)},
        rows_per_shard=config.rows_per_shard or None,
        offsets=tokens.offsets if score.tokens else None,
    )


def _run(
    writer: StoreWriter,
    pending: list[tuple[int, int, int]],
    model: LanguageModel,
    tokens: TokenFile,
    queries: Queries,
    config: IndexConfig,
    progress: Progress,
    plan: Plan,
) -> None:
    of_tokens = bool(queries.config.tokens)
    windows = document_windows(tokens, pending) if of_tokens else pending
    left = sum(int(tokens.offsets[stop] - tokens.offsets[start]) for _, start, stop in windows)
    if left < tokens.total:
        progress.note(f"continuing: {1 - left / tokens.total:.0%} of the tokens are done already")
    sink = MatrixSink(writer, tokens.offsets if of_tokens else None)
    progress.start("scores", left, "tokens")
    with torch.enable_grad(), measuring(model, queries, plan.route) as measure:
        budget = config.token_batch_size
        run_windows(model, tokens, windows, [sink], measure, budget=budget, progress=progress, deal="windows")
    progress.stop()


def _texts(
    scores: ScoreStore, hits: SearchResult, records: Iterable[dict[str, Any]], tokens: TokenFile, tokenizer: Any
) -> dict[int, str]:
    """What to show of the rows in the answer."""
    rows = np.unique(np.concatenate([hits.top_rows.ravel(), hits.bottom_rows.ravel()]))
    places = [scores.store.document(int(row)) for row in rows]
    wanted = {document for document, _ in places}
    found = {number: record_text(record) for number, record in enumerate(records) if number in wanted}
    if scores.store.offsets is None:
        return {int(row): found[int(row)] for row in rows}
    shown = {}
    for row, (document, position) in zip(rows, places):
        token = int(tokens.ids(document)[position])
        shown[int(row)] = f"[{tokenizer.decode([token]) if tokenizer else token}] of {found[document]}"
    return shown
