"""Scores on disk: what went in comes out in every format, in the right order, with its sign and origin."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest

from gradstore import GradStoreError, InvalidInput, ScoreStore, StoreIncomplete, StoreWriter, verify

QUERIES = ["what is x?", 'ü,"quoted"', "q2"]
PROVENANCE = {"index": "runs/a", "method": "grad-cos", "damping": 0.1}


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((500, 3)) * 10.0 ** rng.integers(-12, 12, (500, 3))
    values[rng.random((500, 3)) < 0.3] = 0  # ties
    return values.astype(np.float32)


def begin(path, **options):
    options = {"rows": 500, "queries": QUERIES, "plan": {"p": 1}, "rows_per_shard": 120, **options}
    return ScoreStore.create(path, provenance=PROVENANCE, **options)


@pytest.fixture
def scored(tmp_path, values):
    with begin(tmp_path / "scores") as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, values[start:stop])
    return ScoreStore.open(tmp_path / "scores")


def test_what_went_in_comes_out(scored, values):
    np.testing.assert_array_equal(scored.block(0, 500), values)
    np.testing.assert_array_equal(scored.block(100, 300, ["q2"]), values[100:300, 2:])
    assert scored.queries == QUERIES
    assert scored.provenance == PROVENANCE
    assert scored.sign == "positive: training on the row lowers the query's loss"
    assert scored.written.all()
    assert verify(scored.store.path).ok


@pytest.mark.parametrize("k", [0, 1, 7, 500, 900])
def test_top_and_bottom_equal_a_stable_sort(scored, values, k):
    result = scored.top(k)
    for query in range(3):
        column = values[:, query]
        assert result.top_rows[query].tolist() == np.argsort(-column, kind="stable")[:k].tolist()
        assert result.bottom_rows[query].tolist() == np.argsort(column, kind="stable")[:k].tolist()
        np.testing.assert_array_equal(result.top_scores[query], np.sort(column)[::-1][:k])


def test_resuming_fills_what_is_missing(tmp_path, values):
    writer = begin(tmp_path / "scores")
    writer.write(2, values[240:360])
    writer.close()
    with pytest.raises(StoreIncomplete):
        ScoreStore.open(tmp_path / "scores")
    half = ScoreStore.open(tmp_path / "scores", partial=True)
    assert np.flatnonzero(half.written).tolist() == list(range(240, 360))
    assert set(half.top(5).top_rows.ravel()) <= set(range(240, 360))
    with StoreWriter.resume(tmp_path / "scores", plan={"p": 1}) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, values[start:stop])
    np.testing.assert_array_equal(ScoreStore.open(tmp_path / "scores").block(0, 500), values)


def test_csv_and_jsonl_read_back_bit_for_bit(scored, values, tmp_path):
    scored.export(tmp_path / "s.csv")
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    assert header == ["row", *QUERIES]
    assert [int(line[0]) for line in lines] == list(range(500))
    np.testing.assert_array_equal(np.array([line[1:] for line in lines], np.float32), values)
    scored.export(tmp_path / "s.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text("utf-8").splitlines()]
    assert [line["row"] for line in lines] == list(range(500))
    read = np.array([[line["scores"][query] for query in QUERIES] for line in lines], np.float32)
    np.testing.assert_array_equal(read, values)


def test_parquet_carries_sign_and_origin(scored, values, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    scored.export(tmp_path / "s.parquet")
    table = parquet.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["row", *QUERIES]
    np.testing.assert_array_equal(np.stack([table[name].to_numpy() for name in QUERIES], axis=1), values)
    assert json.loads(table.schema.metadata[b"provenance"]) == PROVENANCE
    assert b"lowers" in table.schema.metadata[b"sign"]


def test_refusals(scored, store, tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="holds gradients, not scores"):
        ScoreStore.open(store.path)
    with pytest.raises(InvalidInput, match=r"unknown kind of file '.xls'; known: .csv, .jsonl, .parquet"):
        scored.export(tmp_path / "s.xls")
    for queries in (["a", "a"], "abc"):
        with pytest.raises(InvalidInput, match="different names"):
            begin(tmp_path / "t", queries=queries)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(GradStoreError, match="Parquet needs pyarrow"):
        scored.export(tmp_path / "s.parquet")
