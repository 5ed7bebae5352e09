"""BM25 against the formula written out, and what the formula implies."""

import math
from random import Random

import numpy as np
import pytest

from attribute._errors import DataError
from attribute.methods.bm25 import BM25, words


def reference(documents: list[str], query: str, k1: float, b: float) -> list[float]:
    """Robertson & Zaragoza's sum, one document and one word at a time."""
    texts = [words(document) for document in documents]
    mean_length = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        score = 0.0
        for word in words(query):
            holders = sum(word in each for each in texts)
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            frequency = text.count(word)
            if frequency:
                length_factor = k1 * (1 - b + b * len(text) / mean_length)
                score += idf * frequency * (k1 + 1) / (frequency + length_factor)
        scores.append(score)
    return scores


def some_documents(seed: int) -> list[str]:
    random = Random(seed)
    return [" ".join(random.choices("abcdefghij", k=random.randrange(12))) for _ in range(30)]


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.0, 0.75), (2.0, 0.0), (1.5, 1.0)])
def test_agrees_with_the_formula(k1, b):
    documents = some_documents(0)
    for query in ("a", "a b c", "a a j", "nowhere", ""):
        np.testing.assert_allclose(
            BM25(documents, k1=k1, b=b).scores(query), reference(documents, query, k1, b), rtol=1e-12
        )


def test_worked_by_hand():
    # Two documents of the mean length, the word in one of them: ln(1 + 1.5/1.5) · 1 · 2.2 / (1 + 1.2) = ln 2.
    assert BM25(["baker here", "tanner here"]).scores("baker").tolist() == pytest.approx([math.log(2), 0.0])


def test_a_rare_word_weighs_more_than_a_common_one():
    scores = BM25(["the baker", "the rain", "the wind", "the hail"]).scores("the baker")
    assert scores.argmax() == 0
    assert scores[1] == scores[2] == scores[3] > 0  # a word in every document still counts a little


def test_repetition_saturates_and_length_costs():
    once, often, long = BM25(["salt x", "salt salt", "salt x y z u v w"]).scores("salt")
    assert once < often < 2 * once
    assert long < once


def test_case_and_punctuation_do_not_matter():
    index = BM25(["The Baker, of Straße.", "nothing"])
    np.testing.assert_array_equal(index.scores("the baker of strasse"), index.scores("THE baker! OF STRASSE?"))
    assert index.scores("STRASSE")[0] > 0


def test_documents_without_words_score_nothing():
    assert BM25(["", "..."]).scores("anything at all").tolist() == [0.0, 0.0]


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="at least one document"):
        BM25([])
    with pytest.raises(DataError, match="not k1=-1"):
        BM25(["a"], k1=-1)
    with pytest.raises(DataError, match="b=2"):
        BM25(["a"], b=2)
