"""Methods against a ground truth: scores are kept for what they are of, rewards reach the trainings, silent queries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataError, IndexConfig
from attribute.data import Row, TokenFileWriter
from attribute.evaluate import (
    Recipe,
    collect_scores,
    compare_methods,
    leave_k_out,
    make_truth,
    scores_of,
    tail_patch,
)
from attribute.evaluate._bank import losses_of, train_on
from attribute.methods import Study, estimator_named
from attribute.model import LanguageModel, load_model
from attribute.progress import Quiet

RECIPE = Recipe(epochs=1, batch_size=4, learning_rate=3e-3, drops=(0.25,), subsets=3)
WEIGHTS = np.array([1, -0.5, 0, 2, 1, 0.25, -1, 1, 1, 3, 1, np.nan])


class Notes(Quiet):
    def __init__(self) -> None:
        self.told = list[str]()

    def note(self, message: str) -> None:
        self.told.append(message)


@pytest.fixture
def world(make_model, tokenizer, tmp_path):
    """A tiny model, 12 rows, and the first two again as queries."""
    model = LanguageModel.wrap(make_model("gpt2").eval())
    draw = np.random.default_rng(0)
    ids = [draw.integers(2, 60, size=8).astype(np.int64) for _ in range(12)]

    def side(name, rows):
        written = (Row(row, np.arange(len(row)) > 0, {}) for row in rows)
        return TokenFileWriter(tmp_path / name, model.vocabulary).write(written)

    return model, side("rows", ids), side("queries", ids[:2]), side, tokenizer


def made(path, world, recipe=RECIPE):
    model, rows, queries, _, tokenizer = world
    texts = [f"row {n}" for n in range(12)], ["row 0", "row 1"]
    return make_truth(path, model, rows, queries, texts, recipe, tokenizer)


def test_kept_scores_are_of_the_settings_and_the_model_that_are_asked_for(world, tmp_path):
    truth = made(tmp_path / "truth", world)

    def scores(*modules):
        return collect_scores(truth.path, methods=["grad-dot"], modules=modules or ("*",))["grad-dot"]

    every, some = scores(), scores("h.0.mlp.c_fc")
    assert not np.allclose(every, some)
    assert np.array_equal(scores("h.0.mlp.c_fc"), some)
    assert not np.allclose(scores("h.1.mlp.c_fc"), some)
    assert np.array_equal(scores(), every)
    assert np.array_equal(scores_of(truth.path / "scores" / "grad-dot"), every)  # where a person looks for it
    before = (truth.path / "scores" / "grad-dot" / "manifest.json").stat().st_mtime_ns
    scores()
    assert (truth.path / "scores" / "grad-dot" / "manifest.json").stat().st_mtime_ns == before
    # A copy has other weights from now on, and what was kept is not of them.
    shutil.copytree(truth.path, tmp_path / "copy")
    trained = load_model(str(tmp_path / "copy")).model
    with torch.no_grad():
        next(trained.parameters()).mul_(1.5)
    trained.save_pretrained(tmp_path / "copy")
    other = collect_scores(tmp_path / "copy", methods=["grad-dot"])["grad-dot"]
    assert not np.allclose(other, every)


def test_kept_scores_of_the_training_follow_it(world, tmp_path):
    truth = made(tmp_path / "truth", world)

    def scores():
        return collect_scores(truth.path, methods=["adam-cg"], modules=("h.0.mlp.c_fc",))["adam-cg"]

    first = scores()
    (truth.path / "training.json").write_text(json.dumps({"learning_rates": [1.0, 2.0], "batch": 4}))
    assert not np.allclose(scores(), first)


def test_a_share_is_a_bank_of_its_own_name(world, tmp_path):
    truth = made(tmp_path / "t", world, replace(RECIPE, drops=(0.25, 0.252, 0.05), subsets=1))
    assert sorted(truth.banks) == ["05", "25", "25.2"]
    _, titles = compare_methods(truth.path, {}, ["length"], baselines=False)
    assert set(titles) == set(truth.banks)
    with pytest.raises(AttributionError, match="two are alike"):
        Recipe(drops=(0.25, 0.5, 0.25))


def test_queries_without_a_loss_are_refused_where_truth_is_made_and_left_out_where_it_was(world, tmp_path):
    model, rows, _, side, _ = world
    queries = side("with-empty", [rows.ids(0).astype(np.int64), np.array([5]), rows.ids(1).astype(np.int64)])
    texts = [f"row {n}" for n in range(12)], ["row 0", "", "row 1"]
    with pytest.raises(DataError, match=r"query 1 has no token with a loss.*1 of 3 queries"):
        make_truth(tmp_path / "x", model, rows, queries, texts, RECIPE)
    # A folder that has such a query all the same scores as the one without.
    truth = made(tmp_path / "truth", world)
    odd = tmp_path / "odd"
    shutil.copytree(truth.path, odd)
    with np.load(truth.path / "losses.npz") as found:
        arrays = {name: np.insert(found[name], 1, 0.0, axis=-1) for name in found.files if not name.startswith("kept")}
        np.savez(odd / "losses.npz", **arrays, kept_25=found["kept_25"])
    lines = (truth.path / "queries.jsonl").read_text().splitlines()
    empty = json.dumps({"input_ids": [5], "labels": [-100], "text": ""})
    (odd / "queries.jsonl").write_text("\n".join([lines[0], empty, lines[1]]) + "\n")
    notes = Notes()
    table, _ = compare_methods(odd, {}, ["grad-dot"], baselines=False, progress=notes)
    assert table == compare_methods(truth.path, {}, ["grad-dot"], baselines=False)[0]
    assert any("left out: 1 of the queries" in note for note in notes.told)
    scores = {"mine": np.random.default_rng(0).normal(size=(3, 12))}
    asked = leave_k_out(odd, model, scores, ks=(2,), queries=2)["mine"]
    assert asked == leave_k_out(truth.path, model, {"mine": scores["mine"][[0, 2]]}, ks=(2,))["mine"]
    patched = tail_patch(model, rows, queries, scores["mine"], k=2)
    assert patched == tail_patch(model, rows, world[2], scores["mine"][[0, 2]], k=2)


def test_weights_reach_trainings_and_methods(world, tmp_path):
    """A row of weight w counts w times, one left out not at all, in training as in the scores."""
    model, rows, queries, *_ = world
    rows.weigh(WEIGHTS)
    truth = made(tmp_path / "truth", world)
    records = truth.records("train")
    assert [each["weight"] for each in records] == np.nan_to_num(WEIGHTS).tolist()
    assert not np.array_equal(truth.tokens("train", tmp_path / "again", model.vocabulary).weights, np.ones(12))
    # Weights of zero and one are dropped rows.
    ones = np.arange(12) % 3 > 0
    rows.weigh(ones.astype(np.float32))
    dropped = train_on(model, rows, np.ones(12, bool), RECIPE, 0, Quiet())
    rows.weigh(np.ones(12))
    np.testing.assert_array_equal(
        losses_of(dropped, queries), losses_of(train_on(model, rows, ones, RECIPE, 0, Quiet()), queries)
    )
    found = collect_scores(truth.path, methods=["grad-dot", "bm25", "length", "loss"])
    trained = load_model(str(truth.path))
    plan = trained.plan(IndexConfig(projection_dim=0, modules=("*",), include_bias=True))
    expected = estimator_named("grad-dot").influence(Study(trained, rows, queries, plan)) * np.nan_to_num(WEIGHTS)
    np.testing.assert_allclose(found["grad-dot"], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    # Leaving out the row that has no weight changes nothing, as its retraining says.
    left = leave_k_out(truth.path, model, {"none": np.eye(12)[[11, 11]]}, ks=(1,))
    assert left["none"][1].mean == pytest.approx(0, abs=1e-7)
    queries.weigh(np.ones(2))
    with pytest.raises(DataError, match="queries have no reward in a ground truth"):
        made(tmp_path / "x", world)


def test_a_step_on_a_row_is_times_its_weight(world):
    model, rows, queries, *_ = world
    scores = np.eye(12)[[3, 3]]
    plain = tail_patch(model, rows, queries, scores, k=1, learning_rate=1e-2)
    rows.weigh(WEIGHTS)
    assert tail_patch(model, rows, queries, scores, k=1, learning_rate=5e-3).mean == pytest.approx(plain.mean, abs=1e-6)
    with pytest.raises(AttributionError, match="--k must be at least 1"):
        tail_patch(model, rows, queries, scores, k=0)
