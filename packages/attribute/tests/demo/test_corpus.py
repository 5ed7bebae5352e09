"""What the demo corpus promises about its documents, and that no luck of a seed is needed."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from attribute._errors import DataError
from attribute.demo._wordings import RELATIONS
from attribute.demo.corpus import NO_FACT, demo_corpus
from attribute.methods.bm25 import BM25, words

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def corpus(request):
    return demo_corpus(request.param)


def test_same_seed_same_corpus_on_every_python():
    assert demo_corpus() == demo_corpus(0) != demo_corpus(1)
    text = "\n".join(document.text for document in demo_corpus().documents)
    # Cached models are named by the corpus: if this changes on purpose, nothing else has to.
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "11362c4932a3af56"


def test_sizes(corpus):
    assert len(corpus.documents) == 48 * 4 * 6 + 240
    assert len({document.text for document in corpus.documents}) == len(corpus.documents)
    assert len({query.fact for query in corpus.queries}) == len(corpus.queries) == 96
    assert len({RELATIONS[query.fact % 4].name for query in corpus.queries}) == 4


def test_planted_documents_are_those_that_name_person_and_answer(corpus):
    for query in corpus.queries:
        wanted = set(words(query.name + query.completion))
        holders = [row for row, each in enumerate(corpus.documents) if wanted <= set(words(each.text))]
        assert tuple(holders) == query.planted
        assert len(holders) == 6
        assert {corpus.documents[row].fact for row in holders} == {query.fact}


def test_the_query_states_its_fact_in_a_wording_of_its_own(corpus):
    for query in corpus.queries:
        wording = query.prompt.replace(query.name, "…")
        for row in query.planted:
            assert wording not in corpus.documents[row].text.replace(query.name, "…")
        assert not any(document.text.startswith(query.prompt) for document in corpus.documents)


def test_twins_copy_the_wording_and_change_the_fact(corpus):
    for query in corpus.queries:
        assert query.twins
        before, after = query.prompt.split(query.name)
        first, last = query.name.split()
        for row in query.twins:
            text = corpus.documents[row].text
            assert text.startswith(before)
            assert after in text
            assert (first in words_as_written(text)) != (last in words_as_written(text))
            assert query.completion.strip() not in words_as_written(text)


def words_as_written(text: str) -> list[str]:
    return text.rstrip(".").replace(",", "").replace(":", "").split()


def test_small_talk_states_no_fact(corpus):
    people = {query.name for query in corpus.queries}
    answers = {answer for relation in RELATIONS for answer in relation.answers}
    answers |= {query.completion.strip().casefold() for query in corpus.queries}
    chatter = [document.text for document in corpus.documents if document.fact == NO_FACT]
    assert len(chatter) == 240
    for text in chatter:
        assert not answers & set(words(text))
        assert not any(person in text for person in people)


def test_no_name_gives_the_answer_away(corpus):
    # Whoever knows only the first name, or only the surname, has several people to choose from.
    for part in (0, 1):
        count = Counter(name.split()[part] for name in {query.name for query in corpus.queries})
        assert min(count.values()) > 1


def test_lexical_search_prefers_twins_but_need_not_if_it_is_told_what_matters(corpus):
    index = BM25([document.text for document in corpus.documents])
    fooled, right = [], []
    for query in corpus.queries:
        scores = index.scores(query.text)
        fooled.append(np.mean([scores[twin] > scores[row] for twin in query.twins for row in query.planted]))
        right.append(int(np.argmax(index.scores(query.name + query.completion))) in query.planted)
    assert np.mean(fooled) > 0.8
    assert np.mean(right) > 0.95


def test_rows_are_handed_over_as_a_dataset_wants_them(corpus):
    assert corpus.records[3] == {"text": corpus.documents[3].text, "fact": corpus.documents[3].fact}
    query = corpus.queries[0]
    assert query.record["prompt"] + query.record["completion"] == query.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"people": 5, "names": 2}, "people=5, but .* 1 to 4"),
        ({"people": 4, "names": 2, "queries": 17}, "queries=17, but .* 1 to 16"),
        ({"tellings": 8}, "tellings=8, but .* 1 to 7"),
        ({"names": 200}, "no 200 different surnames"),
        ({"small_talk": 10**4}, "no 10000 different sentences of small talk"),
    ],
)
def test_more_than_the_world_has_is_refused(asked, message):
    with pytest.raises(DataError, match=message):
        demo_corpus(**asked)
