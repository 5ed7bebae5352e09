"""The demo's model: made once, whole or not at all, the same bytes every time; and traced back to its texts."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradcore
from attribute._errors import ModelError
from attribute.demo._network import Recipe, padded
from attribute.demo.corpus import demo_corpus
from attribute.demo.model import default_cache, demo_model, knowledge
from attribute.demo.showcase import compare

VILLAGE = demo_corpus(people=24, names=8, queries=24, small_talk=20)
BRIEF = Recipe(width=16, layers=1, heads=2, epochs=1)


def make(cache: Path, on_step=None, **changes) -> Path:
    return demo_model(cache, on_step, **{"corpus": VILLAGE, "recipe": BRIEF, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def test_is_trained_once(tmp_path):
    folder = make(tmp_path)
    before = contents(folder)

    def never(done, total, loss):
        raise AssertionError("trained again")

    assert make(tmp_path, never) == folder
    assert contents(folder) == before


def test_same_bytes_whatever_the_caller_has_set(tmp_path):
    first = make(tmp_path / "a")
    torch.manual_seed(1234)
    random.seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        second = make(tmp_path / "b")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert contents(first) == contents(second)


def test_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_tells_every_step(tmp_path):
    steps = []
    make(tmp_path, lambda *step: steps.append(step))
    total = math.ceil(len(VILLAGE.documents) / BRIEF.batch)
    assert [(done, of) for done, of, _ in steps] == [(done, total) for done in range(1, total + 1)]
    losses = [loss for _, _, loss in steps]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_a_killed_run_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    class Killed(BaseException):
        pass

    def die(done, total, loss):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        make(tmp_path, die)
    assert list(tmp_path.iterdir()) == []
    # What a kill −9 leaves behind, with files in it, is not taken for a model either.
    expected = make(tmp_path / "elsewhere")
    torn = tmp_path / f"{expected.name}.unfinished-0123"
    torn.mkdir()
    (torn / "config.json").write_text("{")
    assert contents(make(tmp_path)) == contents(expected)


def test_two_at_once_end_with_one_model(tmp_path):
    inner = []

    def race(done, total, loss):
        if done == 1:
            inner.append(make(tmp_path))

    outer = make(tmp_path, race)
    assert inner == [outer]
    assert [each.name for each in tmp_path.iterdir()] == [outer.name]


def test_the_name_holds_everything_that_shaped_it(tmp_path):
    made = {
        make(tmp_path).name,
        make(tmp_path, recipe=Recipe(width=16, layers=1, heads=2, epochs=1, seed=1)).name,
        make(tmp_path, corpus=demo_corpus(1, people=24, names=8, queries=24, small_talk=20)).name,
    }
    assert len(made) == 3


def test_is_an_ordinary_folder(tmp_path):
    folder = make(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {*contents(folder)}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, len(tokenizer)) == ("gpt_neox", model.config.vocab_size)
    assert not model.training
    for text in [VILLAGE.documents[0].text, "Words nobody taught it: ŝafo, 東京, \n\t!", ""]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        if ids:
            assert model(torch.tensor([ids])).logits.isfinite().all()


def test_answers_are_single_tokens_so_that_knowing_the_first_is_knowing_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make(tmp_path))
    for query in VILLAGE.queries:
        prompt, text = tokenizer(query.prompt)["input_ids"], tokenizer(query.text)["input_ids"]
        assert text[: len(prompt)] == prompt
        assert len(text) == len(prompt) + 1


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("TRACE_CACHE", "~/somewhere")
    assert default_cache() == Path.home() / "somewhere"
    monkeypatch.delenv("TRACE_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache() == Path("/caches/trace")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "trace"


def test_a_cache_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")

    def never(done, total, loss):
        raise AssertionError("trained before it knew where to")

    with pytest.raises(ModelError, match="set TRACE_CACHE"):
        make(tmp_path / "file" / "cache", never)


@pytest.fixture(scope="module")
def scholar(tmp_path_factory) -> Path:
    """A model small enough for a test, trained long enough to know most of the village."""
    recipe = Recipe(layers=2, epochs=14, batch=16)
    return demo_model(tmp_path_factory.mktemp("scholar"), corpus=VILLAGE, recipe=recipe)


def test_learns_facts_well_enough_to_state_them_in_other_words(scholar, tmp_path):
    learnt, fresh = knowledge(scholar, VILLAGE.queries), knowledge(make(tmp_path), VILLAGE.queries)
    assert learnt.accuracy > 0.75
    assert fresh.accuracy < 0.25  # guessing among two dozen answers


def test_gradients_find_the_planted_texts_where_bm25_does_not(scholar):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(scholar).eval(), AutoTokenizer.from_pretrained(scholar)
    plan = gradcore.CapturePlan.for_model(model.base_model, kinds=gradcore.MATRICES)

    def gradients(texts: list[str], prompts: list[str]) -> np.ndarray:
        ids, labels = padded(tokenizer(texts)["input_ids"])
        for row, prompt in enumerate(prompts):
            labels[row, : len(tokenizer(prompt)["input_ids"])] = -100
        with gradcore.GradientCollector(model.base_model, plan) as collector:
            hidden = model.base_model(ids).last_hidden_state
            gradcore.per_example_loss(hidden, model.get_output_embeddings().weight, labels).sum().backward()
        return torch.nn.functional.normalize(collector.rows).numpy()

    asked = gradients([query.text for query in VILLAGE.queries], [query.prompt for query in VILLAGE.queries])
    texts = [document.text for document in VILLAGE.documents]
    scores = asked @ gradients(texts, [""] * len(texts)).T
    pairs = [
        row[planted] > row[twin]
        for query, row in zip(VILLAGE.queries, scores)
        for planted in query.planted
        for twin in query.twins
    ]
    assert np.mean(pairs) > 0.85  # training on a changed fact does not teach this one
    cosine, bm25, told = compare(VILLAGE, {"grad-cos": scores})
    assert cosine.mrr.mean > 0.9
    assert cosine.mrr.low > bm25.mrr.high
    assert told.mrr.mean > 0.95
