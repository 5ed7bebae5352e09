"""Texts in, training rows out: what ``trace query`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import DataError, RunError
from attribute.attributor import Attribution, Attributor, Hit, record_text, require_same_weights
from attribute.config import DataConfig, IndexConfig, QueryConfig
from attribute.data import Row, TokenFile, TokenFileWriter, open_source, rows_of
from attribute.data.sources import Source
from attribute.engine import gradients_of
from attribute.index import source_of
from attribute.model import LanguageModel, load_tokenizer, model_of
from attribute.progress import Progress
from attribute.rerank import best_of, exact_scores, rows_again
from attribute.spectral import plan_of
from gradstore import GradientStore


@dataclass(frozen=True)
class Asker:
    """An index with the model that made it, ready for texts.

    Example::

        asker = Asker.open("runs/quickstart")
        found = asker.ask([{"text": "Once upon a time"}], QueryConfig(top_k=3))
        found.proponents(0)[0].text
    """

    store: GradientStore
    model: LanguageModel
    tokenizer: Any
    config: IndexConfig

    @classmethod
    def open(cls, index: str | Path, *, model: str = "", device: str = "auto") -> Asker:
        """Open a run folder and load its model (or another path to the same weights).

        Raises:
            ModelError: the model cannot be loaded.
            RunError: its weights are not those the index was made from.
        """
        store = GradientStore.open(index)
        plan = plan_of(store)
        config = IndexConfig.from_dict(store.meta["config"])
        name = model or config.model
        loaded = model_of(config, name=name, device=device)
        require_same_weights(plan, loaded.base, str(index), loaded.outside)
        if store.plan["head"] != loaded.head_fingerprint():
            raise RunError(f"{index} was made with another output embedding than {name!r} has: its gradients differ")
        return cls(store, loaded, load_tokenizer(config.tokenizer or name, config.revision), config)

    def ask(
        self,
        records: Iterable[Mapping[str, Any]],
        query: QueryConfig,
        data: DataConfig | None = None,
        progress: Progress | None = None,
    ) -> Attribution:
        """The rows that made the model say these texts: each record is a query.

        Args:
            records: dictionaries with the columns that ``data`` names.
            query: how many rows, which metric, which modules.
            data: which columns; those of the index by default.
            progress: told of ranking again.

        Raises:
            DataError: a query has no token with a loss, or is longer than the context of the model and the index was
                built without truncation.
        """
        return self.ask_source(source_of(records, "the queries"), query, data, progress)

    def ask_source(
        self, source: Source, query: QueryConfig, data: DataConfig | None = None, progress: Progress | None = None
    ) -> Attribution:
        """:meth:`ask` for a dataset opened by :func:`open_source`."""
        attributor = Attributor(self.store, unit_norm=query.unit_norm)
        with tempfile.TemporaryDirectory(prefix="trace-queries-") as folder:
            tokens = self._tokens(source, data, Path(folder, "queries"))
            gradients = gradients_of(self.model, tokens, plan_of(self.store))
            wanted = max(query.top_k, query.rerank)
            found = attributor.search(gradients, wanted, modules=list(query.modules) or None)
            if query.rerank:
                found = self._reranked(found, tokens, query, Path(folder), progress)
        return found

    def _reranked(
        self, found: Attribution, queries: TokenFile, query: QueryConfig, folder: Path, progress: Progress | None
    ) -> Attribution:
        """The same, ordered by whole gradients of what was found for any of the queries."""
        rows = np.unique(np.concatenate([found.result.top_rows.ravel(), found.result.bottom_rows.ravel()]))
        plan = plan_of(self.store)
        plan = plan.restrict(query.modules) if query.modules else plan
        candidates = rows_again(self.store, self.config, self.model, self.tokenizer, rows, folder, progress)
        scores = exact_scores(self.model, plan, queries, candidates, unit_norm=query.unit_norm, progress=progress)
        return Attribution.of(self.store, best_of(rows, scores, query.top_k))

    def gradients(self, source: Source, data: DataConfig | None = None) -> np.ndarray:
        """Gradients of the queries in the store's columns, ``[queries, width]``."""
        with tempfile.TemporaryDirectory(prefix="trace-queries-") as folder:
            return gradients_of(self.model, self._tokens(source, data, Path(folder)), plan_of(self.store))

    def _tokens(self, source: Source, data: DataConfig | None, folder: Path) -> TokenFile:
        data = data or columns_for(source, self.config.data)
        whole = replace(data, chunk_length=0, max_tokens=0)
        rows = [
            self._fitted(row, number, data.truncation)
            for number, row in enumerate(rows_of(source, self.tokenizer, whole, None))
        ]
        return TokenFileWriter(folder, self.model.vocabulary).write(rows)

    def _fitted(self, row: Row, number: int, truncation: bool) -> Row:
        context = self.model.context or len(row.ids)
        if len(row.ids) > context and not truncation:
            raise DataError(f"query {number} has {len(row.ids)} tokens, the model takes {context}: shorten it")
        fitted = Row(row.ids[:context], row.labelled[:context], row.record)
        if not fitted.labelled.any():
            raise DataError(
                f"query {number} has {len(fitted.ids)} tokens, none with a loss: a text needs at least 2, "
                "a completion at least 1 within the model's context"
            )
        return fitted


def columns_for(source: Source, data: DataConfig) -> DataConfig:
    """The index's columns where the queries have them, else ``prompt`` and ``completion``, else ``text``."""
    names = set(source.columns)
    wanted = {data.prompt_column, data.completion_column, data.conversation_column} - {""}
    if data.conversation_column:
        wanted.discard(data.prompt_column)
    if wanted <= names or "input_ids" in names:
        return data
    plain = replace(data, conversation_column="", completion_column="")
    if {"prompt", "completion"} <= names:
        return replace(plain, prompt_column="prompt", completion_column="completion")
    if "text" not in names:
        raise DataError(
            f"{source.name} has the columns {', '.join(source.columns)}: queries need "
            f"{' and '.join(sorted(wanted))} as the index has, or prompt and completion, or text"
        )
    return replace(plain, prompt_column="text")


def read_queries(path: str | Path) -> Source:
    """Open a file of queries, one record each."""
    return open_source(DataConfig(dataset=str(path)))


def answer(found: Attribution, queries: Sequence[Mapping[str, Any]], *, text_field: str = "text") -> dict[str, Any]:
    """The JSON of ``trace query --json``: proponents and opponents of every query, with row, score and text."""

    def listed(hits: list[Hit]) -> list[dict[str, Any]]:
        shown = []
        for hit in hits:
            where = {} if hit.position is None else {"document": hit.document, "position": hit.position}
            shown.append({"row": hit.row, **where, "score": hit.score, "text": hit.column(text_field)})
        return shown

    return {
        "queries": [
            {
                "query": number,
                "text": record_text(queries[number]),
                "proponents": listed(found.proponents(number)),
                "opponents": listed(found.opponents(number)),
            }
            for number in range(len(found))
        ]
    }
