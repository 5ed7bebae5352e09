"""Ranking again: scores of whole gradients for what a sketched search found."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from attribute import AttributionError, DataConfig, DataError, IndexConfig, build_index
from attribute.query import Asker, QueryConfig
from gradstore import GradientStore


@pytest.fixture
def config(folders, documents, tmp_path) -> IndexConfig:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:14]))
    data = DataConfig(dataset=str(tmp_path / "data.jsonl"))
    return IndexConfig(model=str(folders["gpt2"]), sketch_kind="tensor", sketch_floats=16, data=data)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("normalizer", ["", "adam"])
def test_scores_are_those_of_whole_gradients(unit_norm, normalizer, config, documents, tmp_path):
    config = replace(config, normalizer=normalizer, modules=("*mlp*", "*attn*"))
    build_index(tmp_path / "run", config)
    exact = replace(
        config, sketch_kind="", projection_dim=0, processor_path=str(tmp_path / "run") if normalizer else ""
    )
    build_index(tmp_path / "exact", exact)
    store = GradientStore.open(tmp_path / "exact")
    rows = store.block(0, store.rows).astype(np.float64)
    queries = [{"text": documents[place]} for place in (2, 9, 5)]
    asked = Asker.open(tmp_path / "exact").gradients(source := _source(queries)).astype(np.float64)
    for names in ((), ("*mlp*",)):
        columns = np.concatenate(
            [np.arange(s.start, s.stop) for n, s in store.columns.items() if not names or "mlp" in n]
        )
        left, right = asked[:, columns], rows[:, columns]
        expected = left @ right.T
        if unit_norm:
            expected /= np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1).clip(1e-30)
        query = QueryConfig(top_k=3, unit_norm=unit_norm, modules=names, rerank=14)
        found = Asker.open(tmp_path / "run").ask_source(source, query)
        assert found.indices.tolist() == np.argsort(-expected, axis=1, kind="stable")[:, :3].tolist()
        np.testing.assert_allclose(found.scores, -np.sort(-expected, axis=1)[:, :3], rtol=2e-4)
        opposed = [[hit.row for hit in found.opponents(place)] for place in range(3)]
        assert opposed == np.argsort(expected, axis=1, kind="stable")[:, :3].tolist()


def _source(records):
    from attribute.index import source_of

    return source_of(records, "the queries")


def test_few_candidates_are_enough_for_a_row_itself(config, documents, tmp_path):
    build_index(tmp_path / "run", config)
    found = Asker.open(tmp_path / "run").ask([{"text": documents[3]}], QueryConfig(top_k=1, rerank=2))
    assert found.proponents(0)[0].text == documents[3]
    assert found.scores[0, 0] == pytest.approx(1, abs=1e-5)
    assert found.scores.shape == (1, 1)


def test_what_cannot_be_ranked_again_is_refused(config, documents, tmp_path):
    with pytest.raises(AttributionError, match=r"at least --top-k \(5\)"):
        QueryConfig(rerank=2)
    build_index(tmp_path / "tokens", replace(config, attribute_tokens=True))
    with pytest.raises(DataError, match="index of tokens"):
        Asker.open(tmp_path / "tokens").ask([{"text": documents[3]}], QueryConfig(top_k=1, rerank=2))
    build_index(tmp_path / "run", config)
    with (tmp_path / "data.jsonl").open("a") as stream:
        stream.write(json.dumps({"text": "one more row"}) + "\n")
    with pytest.raises(DataError, match="has changed since"):
        Asker.open(tmp_path / "run").ask([{"text": documents[3]}], QueryConfig(top_k=1, rerank=2))
