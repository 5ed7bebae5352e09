"""The main job on real models and real texts, where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attribute import Asker, DataConfig, IndexConfig, QueryConfig, RunError, build_index
from gradstore import verify


@pytest.fixture(scope="module")
def stories(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Asker:
    """The first 299 paragraphs of TinyStories that are unlike each other, and the eleventh once more."""
    folder = tmp_path_factory.mktemp("stories")
    with (assets / "text" / "tinystories-0.9mb.txt").open(encoding="utf-8") as stream:
        lines = (line.strip() for line in stream)
        texts = list(dict.fromkeys(line for line in lines if len(line) > 80))[:299]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[10]]))
    config = IndexConfig(
        model=str(assets / "llama-stories260k"),
        data=DataConfig(dataset=str(folder / "data.jsonl"), truncation=True),
    )
    build_index(folder / "run", config)
    return Asker.open(folder / "run")


@pytest.fixture(scope="module")
def shakespeare(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Asker:
    """The first 200 chunks of 64 tokens of Tiny Shakespeare, which the model was trained on."""
    folder = tmp_path_factory.mktemp("shakespeare")
    text = (assets / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    (folder / "data.txt").write_text(text[:60_000])
    data = DataConfig(
        dataset=str(folder / "data.txt"), data_args="sample_by=document", chunk_length=64, max_tokens=200 * 64
    )
    build_index(folder / "run", IndexConfig(model=str(assets / "gpt2-shakespeare" / "run0"), data=data))
    return Asker.open(folder / "run")


def test_a_story_asked_finds_itself_first(stories):
    rows = list(range(11, 299, 24))
    found = stories.ask([stories.store.data(row) for row in rows], QueryConfig(top_k=2))
    assert found.indices[:, 0].tolist() == rows
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)
    assert (found.scores[:, 1] < 0.999).all()


def test_a_planted_duplicate_ties_with_its_original(stories):
    (hits,) = [stories.ask([stories.store.data(10)], QueryConfig(top_k=3)).proponents()]
    assert {hits[0].row, hits[1].row} == {10, 299}
    assert hits[0].score - hits[1].score <= 1e-6
    assert hits[2].score < 0.999
    for unit_norm in (True, False):
        found = stories.ask([{"text": "Once upon a time there was a little dog."}], QueryConfig(300, unit_norm))
        scores = dict(zip(found.indices[0].tolist(), found.scores[0].tolist()))
        assert scores[10] == pytest.approx(scores[299], rel=1e-5)


def test_chunks_are_64_tokens_and_concatenate_to_the_play(shakespeare, assets):
    store = shakespeare.store
    assert store.rows == 200
    text = "".join(store.data(row)["text"] for row in range(200))
    assert (assets / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8").startswith(text)
    assert set(store.side("tokens").tolist()) == {63}


def test_a_chunk_asked_by_its_tokens_finds_itself_first(shakespeare):
    """By its tokens: the text of a chunk, tokenised alone, need not give the same tokens at its edges."""
    from attribute.data import TokenFileWriter, rows_of
    from attribute.data.sources import open_source
    from attribute.engine import gradients_of

    config = shakespeare.config
    rows = rows_of(open_source(config.data), shakespeare.tokenizer, config.data, shakespeare.model.context)
    chosen = [row for number, row in enumerate(rows) if number % 16 == 3]
    folder = shakespeare.store.path.parent / "chosen"
    tokens = TokenFileWriter(folder, shakespeare.model.vocabulary).write(chosen)
    from attribute import Attributor

    attributor = Attributor(shakespeare.store, unit_norm=True)
    found = attributor.search(gradients_of(shakespeare.model, tokens, attributor.plan), 2)
    assert found.indices[:, 0].tolist() == list(range(3, 200, 16))
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)


def test_a_chunk_asked_by_its_text_finds_itself_first(shakespeare):
    rows = list(range(3, 200, 16))
    found = shakespeare.ask([{"text": shakespeare.store.data(row)["text"]} for row in rows], QueryConfig(top_k=1))
    assert np.mean(found.indices[:, 0] == rows) >= 0.9


def test_another_run_of_the_same_training_is_refused(shakespeare, assets):
    with pytest.raises(RunError, match="was made from other weights"):
        Asker.open(shakespeare.store.path, model=str(assets / "gpt2-shakespeare" / "run1"))


def test_the_stores_are_sound(stories, shakespeare):
    assert verify(stories.store.path).ok
    assert verify(shakespeare.store.path).ok
