"""BM25: which documents share rare words with a query. The baseline to print beside every gradient method.

Finding the passage that states a fact, word counts beat gradients on a large web corpus (Chang et al. 2024, "Scalable
Influence and Fact Tracing for Large Language Model Pretraining"), so a gradient method's figure says little alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attribute._errors import DataError

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The case-folded words of a text.

    >>> words("Don't ask the Baker.")
    ['don', 't', 'ask', 'the', 'baker']
    """
    return _WORD.findall(text.casefold())


class BM25:
    """Okapi BM25 over a fixed set of documents.

    >>> index = BM25(["the baker of Ash", "the tanner of Elm", "rain"])
    >>> index.scores("who is the baker").argmax()
    np.int64(0)

    The score of document D is Σ over words w of the query (a word asked twice counts twice) of

        idf(w) · f (k1 + 1) / (f + k1 (1 − b + b |D| / mean |D|)),   f = how often w stands in D,

    after Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", eq. 3.15, with the factor
    k1 + 1 of Robertson et al. 1994 (TREC-3). idf(w) = ln(1 + (N − n + ½) / (n + ½)) for a word in n of N documents: one
    is added inside the logarithm, as in Lucene, because Okapi's own weight turns negative where n > N/2.

    Args:
        documents: their texts; empty ones are allowed and score 0.
        k1: how slowly repetition saturates; 0 asks only whether a word is there.
        b: how much long documents are marked down, from 0 (not) to 1 (in proportion).

    Raises:
        DataError: there are no documents, or a parameter is out of range.
    """

    def __init__(self, documents: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> None:
        if not documents:
            raise DataError("BM25 needs at least one document, got none")
        if k1 < 0 or not 0 <= b <= 1:
            raise DataError(f"BM25 needs k1 ≥ 0 and 0 ≤ b ≤ 1, not k1={k1} and b={b}")
        counts = [Counter(words(document)) for document in documents]
        lengths = np.array([count.total() for count in counts], dtype=np.float64)
        relative = lengths / (lengths.mean() or 1.0)
        self._documents = len(documents)
        self._postings = _postings(counts, k1 * (1 - b + b * relative), k1)

    def scores(self, query: str) -> NDArray[np.float64]:
        """Score of every document ``[n]``, in the order given; 0 where no word is shared."""
        total = np.zeros(self._documents)
        for word, times in Counter(words(query)).items():
            if word in self._postings:
                rows, weights = self._postings[word]
                total[rows] += times * weights
        return total


def _postings(
    counts: Sequence[Counter[str]], saturation: NDArray[np.float64], k1: float
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Per word the rows it stands in and what it adds to their scores."""
    rows_of: dict[str, list[int]] = {}
    for row, count in enumerate(counts):
        for word in count:
            rows_of.setdefault(word, []).append(row)
    postings = {}
    for word, found in rows_of.items():
        rows = np.array(found)
        frequency = np.array([counts[row][word] for row in found], dtype=np.float64)
        idf = math.log1p((len(counts) - len(found) + 0.5) / (len(found) + 0.5))
        postings[word] = rows, idf * frequency * (k1 + 1) / (frequency + saturation[rows])
    return postings
