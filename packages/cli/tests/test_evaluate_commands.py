"""evaluate, as a person types it."""

from __future__ import annotations

import json

import pytest


def test_ground_truth_is_made_and_methods_judged(trace, models, dataset, tmp_path):
    options = ["--model", models["neox"], "--data.dataset", dataset, "--data.truncation", "--query.dataset", dataset]
    query = ["--query.truncation", "--query.split", "train[6:8]"]
    run = ["--subsets", 3, "--epochs", 1, "--batch-size", 8, "--again"]
    done = trace("evaluate", "make", tmp_path / "truth", *options, *query, *run)
    assert done.code == 0, done.err
    assert "50% of 30 rows dropped" in done.out
    methods = ["--method", "grad-dot", "--method", "adam-cg"]  # which is told how the truth was trained
    found = trace("evaluate", "lds", tmp_path / "truth", *methods, "--plot", tmp_path / "lds.png", "--json").json
    assert {row["method"] for row in found} == {
        "grad-dot",
        "adam-cg",
        "bm25",
        "loss",
        "length",
        "random",
        "noise ceiling",
    }
    assert (tmp_path / "lds.png").stat().st_size > 1000
    again = trace("evaluate", "lds", tmp_path / "truth", "--scores", f"mine={tmp_path}/truth/scores/grad-dot")
    assert "mine" in again.out
    options = ["--model", models["neox"], "--method", "grad-dot", "--k", 2, "--k", 5, "--queries", 1]
    left = trace("evaluate", "leave-out", tmp_path / "truth", *options, "--json").json
    assert [each["method"] for each in left] == ["grad-dot", "random rows"]
    assert {"2", "5"} < set(left[0])
    assert trace("evaluate", "leave-out", tmp_path / "truth", "--method", "grad-dot").code == 2  # which start?
    patched = trace("evaluate", "tail-patch", tmp_path / "truth", "--method", "grad-dot", "--k", 2, "--json").json
    assert patched[0]["fall"]["mean"] > 0
    recall = tmp_path / "labels.jsonl"
    recall.write_text("".join(json.dumps({"rows": [row]}) + "\n" for row in (6, 7)))
    scores = ["--scores", tmp_path / "truth" / "scores" / "grad-dot"]
    assert trace("evaluate", "recall", recall, *scores, "--json").json[0]["MRR"]["mean"] > 0
    same = trace("evaluate", "stability", scores[1], scores[1], "--json").json
    assert same[0]["ρ"]["mean"] == pytest.approx(1)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({"rows": [1, 2, 3]}) + "\n")
    assert 0 <= trace("evaluate", "mislabels", wrong, *scores, "--json").json[0]["AUC"]["mean"] <= 1
    assert trace("evaluate", "recall", wrong, *scores).code == 2  # one line for two queries
    assert trace("evaluate", "lds", tmp_path / "truth", "--no-baselines").code == 1
