"""What the demo shows: the figures of every method over all queries, and a report with some of them spelt out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attribute._errors import DataError
from attribute.demo.corpus import DemoCorpus, Query
from attribute.evaluate import Quality, evaluate_rankings, rank
from attribute.methods.bm25 import BM25
from attribute.report import Entry, Ranking, Report, ReportQuery

_KS = (6, 10)  # a fact of the default corpus is planted six times
_ABOUT = (
    "A small language model was trained on texts about people who do not exist. Each query states a fact that the "
    "model knows, in a wording the texts do not have for it. Planted texts state that fact. Texts marked “changed "
    "fact” copy the query's wording and half of the name, but speak of another person and give another answer: "
    "counting words, as BM25 does, they look better. BM25 is right where somebody tells it that only the name and the "
    "answer matter."
)


def compare(corpus: DemoCorpus, scores: Mapping[str, ArrayLike]) -> tuple[Quality, ...]:
    """Figures of each method, and of BM25 beside them.

    BM25 is asked twice: with the query as it stands, as a method must be that does not know which of its words matter,
    and with nothing but the name and the answer, which is what a person would have to tell it.

    Args:
        corpus: whose queries were asked.
        scores: method name to ``[queries, documents]``, rows as in the corpus.

    Raises:
        DataError: scores of another shape.
    """
    expected = (len(corpus.queries), len(corpus.documents))
    table = {name: np.asarray(each) for name, each in scores.items()}
    for name, each in table.items():
        if each.shape != expected:
            raise DataError(f"the scores of {name} are {list(each.shape)}, the corpus has {list(expected)}")
    bm25 = BM25([document.text for document in corpus.documents])
    table["BM25"] = np.stack([bm25.scores(query.text) for query in corpus.queries])
    table["BM25, told name and answer"] = np.stack([bm25.scores(_told(query)) for query in corpus.queries])
    planted = [query.planted for query in corpus.queries]
    return tuple(evaluate_rankings(name, [rank(row) for row in each], planted, ks=_KS) for name, each in table.items())


def demo_report(
    corpus: DemoCorpus, scores: Mapping[str, ArrayLike], *, model: str, run: str, shown: int = 8, top_k: int = 6
) -> Report:
    """The demo's page: :func:`compare`, and evenly spaced queries with what the first method found.

    Args:
        corpus: whose queries were asked.
        scores: method name to ``[queries, documents]``; the first method's rankings are shown.
        model, run: names for the header.
        shown: queries spelt out; their choice does not depend on how well they went.
        top_k: texts a ranking.
    """
    method, found = next(iter(scores.items()))
    unit = "cosine" if method.endswith("cos") else "score"
    bm25 = BM25([document.text for document in corpus.documents])
    chosen = np.linspace(0, len(corpus.queries) - 1, min(shown, len(corpus.queries))).round().astype(int)
    return Report(
        title="Which training texts made the model say so?",
        about=_ABOUT,
        model=model,
        data=f"{len(corpus.documents):,} invented texts, {len(corpus.queries)} queries",
        method=method,
        run=run,
        queries=tuple(
            _shown(corpus, corpus.queries[each], np.asarray(found)[each], unit, bm25, top_k) for each in chosen.tolist()
        ),
        quality=compare(corpus, scores),
    )


def _shown(
    corpus: DemoCorpus, query: Query, scores: NDArray[np.float64], unit: str, bm25: BM25, top_k: int
) -> ReportQuery:
    order = rank(scores)
    lexical = bm25.scores(query.text)
    return ReportQuery(
        query.prompt,
        query.completion,
        (
            Ranking("Proponents", unit, _entries(corpus, query, order[:top_k], scores)),
            Ranking("BM25", "BM25", _entries(corpus, query, rank(lexical)[:top_k], lexical)),
            Ranking("Opponents", unit, _entries(corpus, query, order[: -top_k - 1 : -1], scores)),
        ),
    )


def _entries(corpus: DemoCorpus, query: Query, rows: Sequence[int], scores: NDArray[np.float64]) -> tuple[Entry, ...]:
    return tuple(
        Entry(
            row,
            float(scores[row]),
            corpus.documents[row].text,
            planted=row in query.planted,
            note="changed fact" if row in query.twins else "",
        )
        for row in rows
    )


def _told(query: Query) -> str:
    return f"{query.name}{query.completion}"
