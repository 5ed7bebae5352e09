"""reduce and score, as a person types them."""

from __future__ import annotations

import csv

import pytest


def test_a_query_is_reduced_and_a_dataset_scored(trace, models, dataset, tmp_path):
    options = ["--model", models["neox"], "--dataset", dataset, "--truncation"]
    made = trace(
        "reduce", tmp_path / "q", *options, "--split", "train[:2]", "--method", "mean", "--unit_normalize", "--json"
    ).json
    assert [each["rows"] for each in made["queries"]] == [2]
    found = trace(
        *("score", tmp_path / "s", "--query_path", tmp_path / "q", "--dataset", dataset, "--truncation"),
        *("--score", "mean", "--unit_normalize", "--export", tmp_path / "s.csv", "--json"),
    ).json
    assert "formed" in found["route"]
    top = found["queries"][0]["proponents"]
    assert {top[0]["row"], top[1]["row"]} == {0, 1}  # those the query was made of
    with (tmp_path / "s.csv").open() as stream:
        exported = list(csv.DictReader(stream))
    assert float(exported[top[0]["row"]]["mean"]) == pytest.approx(top[0]["score"])
    again = trace("score", tmp_path / "s", "--query_path", tmp_path / "q", "--dataset", dataset, "--truncation")
    assert again.code == 1
    assert "finished run" in again.err


def test_an_index_is_a_set_of_queries_and_its_sketch_decides(trace, models, dataset, index, tmp_path):
    run = ["--dataset", dataset, "--truncation", "--query_path", index]
    found = trace("score", tmp_path / "s", "--model", models["neox"], *run, "--unit_normalize", "--json").json
    with_loss = [each for each in found["queries"] if each["proponents"][0]["score"]]
    assert len(with_loss) > 20
    for each in with_loss:
        assert each["proponents"][0]["text"] == each["text"]
        assert each["proponents"][0]["score"] == pytest.approx(1, abs=1e-3)
    refused = trace("score", tmp_path / "x", *run, "--projection_dim", 5)
    assert refused.code == 1
    assert "the queries decide" in refused.err
    assert trace("score", tmp_path / "y", "--query_path", index).code == 2


def test_tokens_and_curvature(trace, models, dataset, tmp_path):
    options = ["--model", models["neox"], "--dataset", dataset, "--truncation"]
    assert trace("reduce", tmp_path / "q", *options, "--split", "train[:1]").code == 0
    assert trace("hessian", tmp_path / "h", *options).code == 0
    run = ["--query_path", tmp_path / "q", "--dataset", dataset, "--truncation", "--json"]
    tokens = trace("score", tmp_path / "t", *run, "--attribute_tokens", "gradient").json
    assert tokens["queries"][0]["proponents"][0]["text"].startswith("[")
    influence = trace("score", tmp_path / "i", *run, "--preconditioner_path", tmp_path / "h").json
    assert influence["queries"][0]["proponents"][0]["score"] > 0
    assert trace("--config", tmp_path / "i" / "config.yaml").code == 1  # finished
