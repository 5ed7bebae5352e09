"""Measures of quality against values worked out by hand and against their definitions written out."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataError, IndexConfig
from attribute.data import Row, TokenFileWriter
from attribute.evaluate import (
    Bank,
    GroundTruth,
    Recipe,
    leave_k_out,
    linear_datamodelling_score,
    make_truth,
    mislabel_auc,
    noise_ceiling,
    ranks,
    score_stability,
    tail_patch,
)
from attribute.methods import Study, estimator_named
from attribute.model import LanguageModel


def scipy_spearman(left, right):
    stats = pytest.importorskip("scipy.stats")
    return stats.spearmanr(left, right).statistic


@pytest.fixture
def bank():
    draw = np.random.default_rng(1)
    kept = draw.random((12, 30)) < 0.5
    truth = draw.normal(size=(4, 30))
    losses = (~kept) @ truth.T + draw.normal(size=(12, 4)) * 0.1
    return Bank("50", kept, losses, losses + draw.normal(size=losses.shape) * 0.1), truth


def test_ranks_share_ties_as_scipy_does():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).integers(0, 5, size=(20, 3)).astype(float)
    assert np.array_equal(ranks(values), stats.rankdata(values, axis=0))


def test_lds_is_spearman_between_summed_scores_and_the_rise_of_the_loss(bank):
    bank, truth = bank
    base = np.array([0.1, 0.2, 0.3, 0.4])
    found = linear_datamodelling_score(bank, base, truth)
    for query in range(4):
        predicted = [sum(truth[query, row] for row in range(30) if not kept[row]) for kept in bank.kept]
        assert found.per_query[query] == pytest.approx(scipy_spearman(predicted, bank.losses[:, query] - base[query]))
    assert found.score.mean == pytest.approx(found.per_query.mean())
    assert found.score.low <= found.score.mean <= found.score.high
    assert found.score.mean > 0.9


def test_lds_knows_scores_by_their_order_alone_and_their_sign(bank):
    bank, truth = bank
    base = np.zeros(4)
    score = linear_datamodelling_score(bank, base, truth).score.mean
    assert linear_datamodelling_score(bank, base, -truth).score.mean == pytest.approx(-score)
    assert linear_datamodelling_score(bank, base, 7 * truth).score.mean == pytest.approx(score)
    order = np.random.default_rng(2).permutation(30)
    moved = Bank("50", bank.kept[:, order], bank.losses)
    assert linear_datamodelling_score(moved, base, truth[:, order]).score.mean == pytest.approx(score)
    assert linear_datamodelling_score(bank, base, np.zeros((4, 30))).score.mean == 0


def test_the_ceiling_is_the_score_of_the_retrainings_themselves(bank):
    bank, _ = bank
    found = noise_ceiling(bank, np.zeros(4))
    assert found.per_query[0] == pytest.approx(scipy_spearman(bank.again[:, 0], bank.losses[:, 0]))
    assert noise_ceiling(Bank("50", bank.kept, bank.losses), np.zeros(4)) is None


def test_auc_counts_pairs():
    scores, wrong = np.array([0.9, 0.4, 0.4, 0.1, 0.3, 0.9]), {0, 2}
    pairs = [
        (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
        for i, j in itertools.product(wrong, set(range(6)) - wrong)
    ]
    found = mislabel_auc(scores, wrong)
    assert found.mean == pytest.approx(np.mean(pairs))
    assert found.low <= found.mean <= found.high
    with pytest.raises(DataError, match="both kinds are needed"):
        mislabel_auc(scores, set())


def test_stability_is_one_for_any_monotone_change():
    scores = np.random.default_rng(0).normal(size=(3, 20))
    assert score_stability(scores, np.exp(scores)).mean == pytest.approx(1)
    assert score_stability(scores, -scores).mean == pytest.approx(-1)
    with pytest.raises(DataError, match="cannot be compared"):
        score_stability(scores, scores[:, :5])


@pytest.fixture
def world(make_model, tmp_path):
    """A tiny model in double so that its trainings are steep, 12 rows, and the first two again as queries."""
    model = LanguageModel.wrap(make_model("gpt2").eval())
    draw = np.random.default_rng(0)
    ids = [draw.integers(2, 60, size=10).astype(np.int64) for _ in range(12)]

    def side(name, rows):
        written = (Row(row, np.arange(10) > 0, {}) for row in rows)
        return TokenFileWriter(tmp_path / name, model.vocabulary).write(written)

    return model, side("rows", ids), side("queries", ids[:2])


RECIPE = Recipe(epochs=2, batch_size=4, learning_rate=3e-3, drops=(0.25,), subsets=4, again=True)


def test_a_bank_is_made_resumed_and_read(world, tmp_path, monkeypatch):
    from attribute.evaluate import _bank

    model, rows, queries = world
    texts = [f"row {n}" for n in range(12)], ["row 0", "row 1"]
    whole = make_truth(tmp_path / "whole", model, rows, queries, texts, RECIPE)
    assert whole.banks["25"].kept.sum(1).tolist() == [9] * 4
    assert whole.banks["25"].dropped == pytest.approx(0.25)
    assert [each["text"] for each in whole.records("queries")] == ["row 0", "row 1"]
    made, real = [], _bank.train_on

    def dying(*arguments):
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_bank, "train_on", dying)
        with pytest.raises(KeyboardInterrupt):
            make_truth(tmp_path / "part", model, rows, queries, texts, RECIPE)
    with pytest.raises(DataError, match="no ground truth"):
        GroundTruth.open(tmp_path / "part")
    again = make_truth(tmp_path / "part", model, rows, queries, texts, RECIPE)
    assert np.array_equal(again.base, whole.base)
    assert np.array_equal(again.banks["25"].losses, whole.banks["25"].losses)
    with pytest.raises(DataError, match="was begun with epochs 2, not 3"):
        make_truth(tmp_path / "part", model, rows, queries, texts, Recipe(epochs=3, drops=(0.25,), subsets=4))
    # A query that lost its own row learns less: what the bank measures is what the rows did.
    bank = whole.banks["25"]
    for query in range(2):
        without, having = (bank.losses[bank.kept[:, query] == kept, query] for kept in (False, True))
        if len(without) and len(having):
            assert without.mean() > having.mean()


def test_a_dropped_row_leaves_no_trace(world, tmp_path):
    """Other content in a row that every subset drops changes nothing."""
    from attribute.evaluate._bank import losses_of, train_on
    from attribute.progress import Quiet

    model, rows, queries = world
    kept = np.ones(12, dtype=bool)
    kept[5] = False
    one = losses_of(train_on(model, rows, kept, RECIPE, 0, Quiet()), queries)
    ids = [rows.ids(row).astype(np.int64) for row in range(12)]
    ids[5] = np.full(10, 7)
    other = TokenFileWriter(tmp_path / "other", model.vocabulary).write(Row(r, np.arange(10) > 0, {}) for r in ids)
    np.testing.assert_allclose(losses_of(train_on(model, other, kept, RECIPE, 0, Quiet()), queries), one, rtol=1e-6)


def test_leaving_out_what_a_method_names_is_training_without_it(world, tmp_path, monkeypatch):
    from attribute.evaluate import _leave_out
    from attribute.evaluate._bank import losses_of, train_on
    from attribute.progress import Quiet

    model, rows, queries = world
    truth = make_truth(tmp_path / "t", model, rows, queries, ([""] * 12, [""] * 2), replace(RECIPE, again=False))
    itself = np.tile(-np.arange(12.0), (2, 1))
    itself[[0, 1], [0, 1]] = 1  # the first row of query 1 is row 1, then 0, 2, 3 …
    found = leave_k_out(tmp_path / "t", model, {"itself": itself, "again": 2 * itself}, ks=(1, 3))
    for k, left_out in ((1, [[0], [1]]), (3, [[0, 1, 2], [1, 0, 2]])):
        rises = []
        for query, dropped in enumerate(left_out):
            kept = np.isin(np.arange(12), dropped, invert=True)
            after = losses_of(train_on(model, rows, kept, RECIPE, 0, Quiet()), queries)
            rises.append(after[query] - truth.base[query])
        assert found["itself"][k].mean == pytest.approx(np.mean(rises))
    assert found["again"] == found["itself"]
    assert found["itself"][1].mean > found["random rows"][1].mean
    # Once trained, never again: not for another method with the same rows, nor on the next call.
    monkeypatch.setattr(_leave_out, "train_on", lambda *_: pytest.fail("trained again"))
    assert leave_k_out(tmp_path / "t", model, {"itself": itself}, ks=(1, 3))["itself"] == found["itself"]


def test_leaving_out_needs_the_recipe_and_its_start(world, make_model, tmp_path):
    model, rows, queries = world
    truth = make_truth(tmp_path / "t", model, rows, queries, ([""] * 12, [""] * 2), replace(RECIPE, again=False))
    scores = {"mine": np.zeros((2, 12))}
    with pytest.raises(AttributionError, match="other weights than those"):
        leave_k_out(truth.path, LanguageModel.wrap(make_model("gpt2", 5).eval()), scores)
    with pytest.raises(AttributionError, match="between 1 and 11"):
        leave_k_out(truth.path, model, scores, ks=(12,))
    with pytest.raises(DataError, match="2 queries for 5 rows"):
        leave_k_out(truth.path, model, {"mine": np.zeros((2, 5))})
    (truth.path / "recipe.json").unlink()
    with pytest.raises(DataError, match="does not say how the ground truth was trained"):
        leave_k_out(truth.path, model, scores)


def test_tail_patch_helps_on_the_query_itself_and_leaves_the_model(world):
    model, rows, queries = world
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    itself = np.zeros((2, 12))
    itself[[0, 1], [0, 1]] = 1
    found = tail_patch(model, rows, queries, itself, k=1, learning_rate=1e-2)
    study = Study(model, rows, queries, model.plan(IndexConfig(projection_dim=0, modules=("*",), include_bias=True)))
    worst = tail_patch(model, rows, queries, -estimator_named("grad-dot").influence(study), k=3, learning_rate=1e-2)
    assert found.mean > 0
    assert found.mean > worst.mean
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


def test_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"losses\.npz is missing"):
        GroundTruth.open(tmp_path)
    np.savez(tmp_path / "losses.npz", base=np.zeros(2))
    with pytest.raises(DataError, match="no bank"):
        GroundTruth.open(tmp_path)
    np.savez(tmp_path / "losses.npz", base=np.zeros(2), kept_50=np.ones((3, 5), bool), loss_50=np.zeros((3, 4)))
    with pytest.raises(DataError, match="3 subsets of 2 queries"):
        GroundTruth.open(tmp_path)
    np.savez(tmp_path / "losses.npz", base=np.zeros(2), kept_50=np.ones((3, 5), bool), loss_50=np.zeros((3, 2)))
    truth = GroundTruth.open(tmp_path)
    with pytest.raises(DataError, match="2 queries for 6 rows, the ground truth has 2 queries and 5 rows"):
        truth.require_shape(np.zeros((2, 6)), "mine")
    with pytest.raises(DataError, match="not finite"):
        truth.require_shape(np.full((2, 5), np.nan), "mine")
    with pytest.raises(AttributionError, match="between 0 and 1"):
        Recipe(drops=(1.0,))


def test_methods_are_told_how_the_ground_truth_was_trained(world, tmp_path):
    """Σ of the rates of the schedule that `train_on` has, and the size of its batches."""
    from attribute.evaluate._truth import training_of

    model, rows, queries = world
    truth = make_truth(tmp_path / "t", model, rows, queries, ([""] * 12, [""] * 2), replace(RECIPE, again=False))
    steps = RECIPE.epochs * -(-12 // RECIPE.batch_size)
    rates = [RECIPE.learning_rate * (1 - step / steps) for step in range(steps)]
    expected = {"horizon": pytest.approx(sum(rates)), "batch": RECIPE.batch_size}
    assert training_of(truth.path, 12) == expected
    (truth.path / "training.json").write_text(json.dumps({"learning_rates": rates, "batch": RECIPE.batch_size}))
    assert training_of(truth.path, 12) == expected
    assert training_of(tmp_path, 12) == {}
