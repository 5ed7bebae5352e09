"""The demo's page and table, from scores whose quality is known."""

import numpy as np
import pytest

from attribute._errors import DataError
from attribute.demo.corpus import demo_corpus
from attribute.demo.showcase import compare, demo_report
from attribute.report import render_report

CORPUS = demo_corpus(people=12, names=6, queries=20, small_talk=20)
SHAPE = (len(CORPUS.queries), len(CORPUS.documents))


def oracle() -> np.ndarray:
    """Planted documents on top, twins at the bottom."""
    scores = np.random.default_rng(0).uniform(-0.5, 0.5, SHAPE)
    for row, query in zip(scores, CORPUS.queries):
        row[list(query.planted)] += 1
        row[list(query.twins)] -= 1
    return scores


def test_an_oracle_is_perfect_and_its_opposite_is_not():
    right, wrong, bm25, told = compare(CORPUS, {"right": oracle(), "wrong": -oracle()})
    assert [each.method for each in (right, wrong)] == ["right", "wrong"]
    assert right.mrr.mean == right.recall[0].share.mean == 1.0
    assert (right.recall[0].k, wrong.recall[0].share.mean) == (6, 0.0)
    assert bm25.method.startswith("BM25")
    assert bm25.mrr.mean < told.mrr.mean


def test_the_page_shows_sources_and_twins():
    report = demo_report(CORPUS, {"grad-cos": oracle(), "grad-dot": -oracle()}, model="m", run="r", shown=5, top_k=3)
    assert (report.method, len(report.queries)) == ("grad-cos", 5)
    assert [each.method for each in report.quality[:2]] == ["grad-cos", "grad-dot"]
    assert report.queries[0].text == CORPUS.queries[0].text
    assert report.queries[-1].text == CORPUS.queries[-1].text
    for query in report.queries:
        proponents, bm25, opponents = query.rankings
        assert [len(each.entries) for each in query.rankings] == [3, 3, 3]
        assert all(entry.planted for entry in proponents.entries)
        twins = next(each.twins for each in CORPUS.queries if each.text == query.text)
        for entry in (*proponents.entries, *bm25.entries, *opponents.entries):
            assert entry.note == ("changed fact" if entry.row in twins else "")
        assert not twins or opponents.entries[0].row in twins
        assert opponents.entries[0].score == min(entry.score for entry in opponents.entries)
        assert proponents.unit == opponents.unit == "cosine" != bm25.unit
        for entry in (*proponents.entries, *opponents.entries):
            assert entry.text == CORPUS.documents[entry.row].text
    assert CORPUS.queries[0].name in render_report(report)


def test_scores_of_another_corpus_are_refused():
    with pytest.raises(DataError, match=r"scores of grad-cos are \[3, 4\], the corpus has \[20, "):
        compare(CORPUS, {"grad-cos": np.zeros((3, 4))})
