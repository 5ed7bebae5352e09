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
    coarse = trace("score", tmp_path / "c", *run, "--projection_dim", 2, "--json")
    assert coarse.code == 0
    assert "the queries decide the sketch, not --projection-dim 2: two_sided(side=4" in " ".join(coarse.err.split())
    for side, wanted in ((5, "25 floats a module"), (0, "whole gradients")):
        refused = trace("score", tmp_path / "x", *run, "--projection_dim", side)
        assert refused.code == 1
        assert f"asks for {wanted}: the queries decide" in " ".join(refused.err.split())
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


def test_the_model_runs_in_the_precision_of_the_queries(trace, models, dataset, tmp_path):
    run = ["--dataset", dataset, "--truncation"]
    made = ["--model", models["neox"], *run, "--precision", "bf16", "--projection-dim", 4]
    assert trace("build", tmp_path / "q", *made).code == 0
    score = ["--query-path", tmp_path / "q", *run, "--unit-normalize", "--json"]
    found = trace("score", tmp_path / "s", *score).json
    assert found["queries"][5]["proponents"][0]["text"] == found["queries"][5]["text"]
    refused = trace("score", tmp_path / "x", *score, "--precision", "fp16")
    assert refused.code == 1
    assert "gradients of the model in bf16, --precision fp16 makes other weights" in " ".join(refused.err.split())
    refused = trace("score", tmp_path / "x", *score, "--precision", "auto")
    assert "the queries are of the model in bf16, this is it in auto" in " ".join(refused.err.split())


def test_a_curvature_that_does_not_fit_is_refused_before_the_model_is_loaded(trace, models, dataset, index, tmp_path):
    options = ["--model", models["neox"], "--dataset", dataset, "--truncation"]
    assert trace("build", tmp_path / "spectral", *options).code == 0
    assert trace("reduce", tmp_path / "q", *options, "--split", "train[:1]").code == 0
    assert trace("hessian", tmp_path / "ekfac", *options).code == 0
    gone = ["--dataset", tmp_path / "no-such-file.jsonl", "--model", tmp_path / "no-model"]

    def refused(queries, *more) -> str:
        done = trace(
            "score", tmp_path / "x", "--query-path", queries, "--preconditioner-path", tmp_path / "ekfac", *gone, *more
        )
        assert done.code == 1
        return " ".join(done.err.split())

    error = refused(tmp_path / "spectral")
    assert "is of whole gradients, the queries in" in error
    assert f"trace preconditioners RUN --index {tmp_path / 'spectral'}" in error
    assert len(error) < 700
    assert "factored damps both Kronecker factors" in refused(tmp_path / "q", "--inversion", "factored")
