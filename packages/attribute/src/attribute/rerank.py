"""Exact scores of the rows that a search found: whole gradients instead of sketched ones, for a few rows.

A sketch errs by about as much as the best rows differ. Whole gradients of the candidates meet those of the queries
module by module as products of factors, so that none of them need exist.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attribute._errors import DataError
from attribute.batching import Batch, assemble, plan_batches
from attribute.config import IndexConfig
from attribute.data import Row, TokenFile, TokenFileWriter, open_source
from attribute.engine import MemorySink, RowBlock, factors_of, finite_losses, labelled_tokens, run_windows
from attribute.index import tokenise
from attribute.meeting import Meeting
from attribute.model import LanguageModel
from attribute.progress import Progress, Quiet
from gradcore import CapturePlan, Identity
from gradstore import GradientStore, SearchResult


def exact_scores(
    model: LanguageModel,
    plan: CapturePlan,
    queries: TokenFile,
    rows: TokenFile,
    *,
    unit_norm: bool,
    budget: int = 2048,
    progress: Progress | None = None,
) -> np.ndarray:
    """⟨g_q, g_i⟩ of whole gradients, or their cosine, ``[queries, rows]`` float32.

    Args:
        model: the model.
        plan: modules, loss and normaliser; its sketch does not matter.
        queries, rows: token files.
        unit_norm: cosines; 0 where a gradient is zero.
        budget: padded tokens a batch.
        progress: told of the rows' pass.
    """
    whole, progress = replace(plan, sketch=Identity()), progress or Quiet()
    batches = list(plan_batches(queries.lengths, np.arange(len(queries)), budget))
    portions = [factors_of(model, assemble(queries, batch, model.device), whole) for batch in batches]
    order = np.concatenate(batches)
    squares = np.concatenate(
        [sum(each.sq_norm().double() for each in some.values()).cpu().numpy() for some in portions]  # type: ignore[union-attr]
    )
    meeting = Meeting(lambda name: [some[name] for some in portions], norms=True)

    def measure(batch: Batch) -> RowBlock:
        losses = finite_losses(model, batch, whole)
        losses.sum().backward()
        scores, lengths = meeting.take()
        assert lengths is not None
        if unit_norm:
            scores = scores / lengths.sqrt().clamp(min=1e-30)[:, None]
        return RowBlock(batch.rows, scores, losses.detach(), labelled_tokens(batch))

    sink = MemorySink(len(rows), len(queries))
    progress.start("exact gradients", rows.total, "tokens")
    with torch.enable_grad(), model.collector(whole, factors=meeting.receive):
        run_windows(model, rows, [(0, 0, len(rows))], [sink], measure, budget=budget, progress=progress)
    progress.stop()
    found = np.empty((len(queries), len(rows)), dtype=np.float32)
    scale = np.maximum(np.sqrt(squares), 1e-30)[:, None] if unit_norm else 1.0
    found[order] = sink.gradients.T / scale
    return found


def rows_again(
    store: GradientStore,
    config: IndexConfig,
    model: LanguageModel,
    tokenizer: Any,
    rows: np.ndarray,
    folder: Path,
    progress: Progress | None = None,
) -> TokenFile:
    """Some rows of an index, read and tokenised again from its dataset.

    Raises:
        DataError: the dataset is not what the index was built from any more; an index of tokens.
    """
    if config.attribute_tokens:
        raise DataError(f"{store.path} is an index of tokens: --rerank takes one of documents")
    every = folder / "every"
    every.mkdir()
    tokens = tokenise(every, open_source(config.data), tokenizer, config, model, progress or Quiet())
    if tokens.digest != store.plan["tokens"]:
        raise DataError(f"{config.data.dataset} has changed since {store.path} was built: rows cannot be ranked again")
    some = TokenFileWriter(folder / "some", model.vocabulary).write(
        Row(tokens.ids(row), tokens.labelled(row).astype(bool), {}) for row in rows.tolist()
    )
    some.weigh(None if tokens.weights is None else tokens.weights[rows])
    return some


def best_of(rows: np.ndarray, scores: np.ndarray, k: int) -> SearchResult:
    """The k best and k worst of the candidates ``[c]`` by their scores ``[q, c]``; ties in the order of the rows.

    >>> import numpy as np
    >>> best_of(np.array([3, 8, 9]), np.array([[0.1, 0.7, 0.2]]), 2).top_rows
    array([[8, 9]])
    """
    down, up = (np.argsort(each, axis=1, kind="stable")[:, :k] for each in (-scores, scores))
    sides = [(rows[place], np.take_along_axis(scores, place, 1)) for place in (down, up)]
    return SearchResult(*sides[0], *sides[1])
