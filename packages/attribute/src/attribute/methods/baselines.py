"""What must stand beside every gradient method: words, hidden states, loss and length.

A method that does not beat these has found nothing that a cheaper look would not.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from attribute._errors import AttributionError
from attribute.methods._estimator import NOTHING, Estimator, register_estimator
from attribute.methods._study import Study, cosines
from attribute.methods.bm25 import BM25


@register_estimator
class Lexical(Estimator):
    """BM25 of the query's text among the rows' texts."""

    name: ClassVar[str] = "bm25"
    uses: ClassVar[frozenset[str]] = NOTHING
    needs: ClassVar[str] = "texts"
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Robertson & Zaragoza 2009, eq. 3.15"

    def influence(self, study: Study) -> np.ndarray:
        """Shared rare words."""
        if len(study.texts) != len(study.rows) or len(study.query_texts) != len(study.queries):
            raise AttributionError("bm25 compares words: the study needs the texts of all rows and queries")
        index = BM25(study.texts)
        return np.stack([index.scores(text) for text in study.query_texts]).astype(np.float32)


@register_estimator
class RepSim(Estimator):
    """Cosine of mean hidden states of the last layer."""

    name: ClassVar[str] = "repsim"
    uses: ClassVar[frozenset[str]] = NOTHING
    cost: ClassVar[str] = "1 forward pass"
    source: ClassVar[str] = "Hanawa et al. 2021"

    def influence(self, study: Study) -> np.ndarray:
        """cos(h_q, h_i)."""
        return cosines(study.hidden(study.queries), study.hidden(study.rows))


@register_estimator
class EmbeddingCosine(Estimator):
    """Cosine of mean input embeddings: a bag of words that knows synonyms."""

    name: ClassVar[str] = "embedding-cos"
    uses: ClassVar[frozenset[str]] = NOTHING
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "baseline"

    def influence(self, study: Study) -> np.ndarray:
        """cos of the mean embeddings."""
        return cosines(study.hidden(study.queries, embedding=True), study.hidden(study.rows, embedding=True))


@register_estimator
class Loss(Estimator):
    """The loss of the row, whatever the query."""

    name: ClassVar[str] = "loss"
    uses: ClassVar[frozenset[str]] = frozenset({"loss_reduction"})
    cost: ClassVar[str] = "1 forward pass"
    source: ClassVar[str] = "baseline"

    def influence(self, study: Study) -> np.ndarray:
        """The same for every query."""
        return np.repeat(study.losses()[None], len(study.queries), axis=0)


@register_estimator
class Length(Estimator):
    """The number of tokens with a loss, whatever the query."""

    name: ClassVar[str] = "length"
    uses: ClassVar[frozenset[str]] = NOTHING
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "baseline"

    def influence(self, study: Study) -> np.ndarray:
        """The same for every query."""
        counts = [float(study.rows.labelled(row)[1:].sum()) for row in range(len(study.rows))]
        return np.repeat(np.array(counts, dtype=np.float32)[None], len(study.queries), axis=0)
