"""Losses and weights of rows through a whole build: advantages, KL to a reference, label smoothing, log odds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataConfig, DataError, IndexConfig, ModelError, build_index
from attribute.curvature import fit_hessian
from attribute.data.rewards import weights_of
from attribute.progress import Quiet
from attribute.scoring import ReduceConfig, ScoreConfig, reduce_gradients, score_dataset

REWARDS = [1.0, 0.0, 2.0, 4.0, 0.5, 0.5]


@pytest.fixture
def config(folders, documents, tmp_path) -> IndexConfig:
    """Three prompts, two completions each."""
    path = tmp_path / "data.jsonl"
    rows = (
        {"prompt": documents[n // 2][:12], "completion": documents[n][:20], "reward": REWARDS[n], "gain": -REWARDS[n]}
        for n in range(6)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(dataset=str(path), prompt_column="prompt", completion_column="completion")
    return IndexConfig(model=str(folders["gpt2"]), projection_dim=0, data=data)


def rows(config, path) -> np.ndarray:
    store = build_index(path, config)
    return store.block(0, store.rows)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_rewards_weigh_rows_by_their_advantage_over_the_prompt(config, tmp_path):
    plain = rows(config, tmp_path / "plain")
    weighted = rows(replace(config, data=replace(config.data, reward_column="reward")), tmp_path / "reward")
    close(weighted, plain * np.array([0.5, -0.5, -1, 1, 0, 0])[:, None])
    given = rows(replace(config, data=replace(config.data, advantage_column="gain")), tmp_path / "gain")
    close(given, -plain * np.array(REWARDS)[:, None])


def test_every_command_weighs_alike(config, tmp_path):
    weighted = replace(config, data=replace(config.data, reward_column="reward"))
    given = rows(weighted, tmp_path / "rows")
    store = reduce_gradients(tmp_path / "query", ReduceConfig("sum"), weighted)
    close(store.block(0, 1), given.sum(0)[None])
    found = score_dataset(
        tmp_path / "scores", ScoreConfig(str(tmp_path / "query")), replace(weighted, projection_dim=None)
    )
    close(found.scores.block(0, 6)[:, 0], given @ given.sum(0))


@pytest.fixture
def with_gap(config, tmp_path) -> tuple[IndexConfig, IndexConfig]:
    """The data with a last row that has no reward, weighed; and without that row."""
    lines = Path(config.data.dataset).read_text()
    gap = {"prompt": "the sea", "completion": " and a hill", "reward": None, "gain": None}
    (tmp_path / "gap.jsonl").write_text(lines + json.dumps(gap) + "\n")
    weighed = replace(config.data, reward_column="reward")
    other = replace(weighed, dataset=str(tmp_path / "gap.jsonl"), skip_nan_rewards=True)
    return replace(config, data=other), replace(config, data=weighed)


@pytest.mark.parametrize("sketch", [0, 3])
@pytest.mark.parametrize("unit", [False, True])
def test_a_row_without_a_reward_is_no_row(unit, sketch, with_gap, tmp_path):
    """Not in a mean, nor in a fit; one whose advantage is 0 is a row, but has no direction."""
    stores = [
        reduce_gradients(tmp_path / f"{n}", ReduceConfig("mean", unit), replace(each, projection_dim=sketch))
        for n, each in enumerate(with_gap)
    ]
    assert [store.data(0)["rows"] for store in stores] == [4, 4] if unit else [6, 6]
    assert np.array_equal(*(store.block(0, 1) for store in stores))
    given = rows(replace(with_gap[1], projection_dim=sketch), tmp_path / "rows")
    if unit:  # of the four with an advantage
        given = given[:4] / np.linalg.norm(given[:4], axis=1, keepdims=True)
    close(stores[0].block(0, 1), given.mean(0)[None])


def test_a_fisher_counts_no_row_without_a_reward_and_says_that_it_knows_none(with_gap, config, tmp_path):
    notes = list[str]()

    class Notes(Quiet):
        def note(self, message: str) -> None:
            notes.append(message)

    found = [
        fit_hessian(tmp_path / f"{n}", each, "kfac", progress=Notes()) for n, each in enumerate((*with_gap, config))
    ]
    assert [each.rows for each in found] == [6, 6, 6]
    for name, module in found[0].modules.items():
        for other in found[1:]:  # rewards or none: the labels are the model's
            torch.testing.assert_close(module.eigenvalues, other.modules[name].eigenvalues)
    assert sum("knows no rewards" in note for note in notes) == 2
    notes.clear()
    fit_hessian(tmp_path / "own", with_gap[0], "kfac", labels="dataset", progress=Notes())
    assert not any("knows no rewards" in note for note in notes)


def test_rewards_that_are_no_numbers_are_refused():
    grpo = DataConfig(prompt_column="p", completion_column="c", reward_column="r")
    with pytest.raises(DataError, match=r"row 1: r is NaN \(--skip-nan-rewards"):
        weights_of([{"p": "a", "r": 1}, {"p": "a", "r": float("nan")}], grpo)
    with pytest.raises(DataError, match="row 0 has no column 'r', only p"):
        weights_of([{"p": "a"}], grpo)
    with pytest.raises(DataError, match="not a number"):
        weights_of([{"p": "a", "r": "good"}], grpo)
    with pytest.raises(DataError, match="infinite"):
        weights_of([{"p": "a", "r": float("inf")}], grpo)
    with pytest.raises(DataError, match="has no column 'prompt'"):
        weights_of([{"p": "a", "r": 1}], replace(grpo, completion_column=""))
    beside = replace(grpo, completion_column="")
    assert weights_of([{"text": "a b", "prompt": "a", "r": r} for r in (1, 3)], beside).tolist() == [-1, 1]
    kept = weights_of(
        [{"p": "a", "r": 1}, {"p": "a", "r": None}, {"p": "a", "r": 3}], replace(grpo, skip_nan_rewards=True)
    )
    assert kept.tolist() == [-1, pytest.approx(np.nan, nan_ok=True), 1]
    talk = DataConfig(conversation_column="m", reward_column="r")
    turns = [{"m": ["question", answer], "r": reward} for answer, reward in (("a", 1.0), ("b", 3.0))]
    assert weights_of(turns, talk).tolist() == [-1, 1]
    with pytest.raises(AttributionError, match="exclude each other"):
        DataConfig(reward_column="r", advantage_column="a")
    with pytest.raises(AttributionError, match="whole completion"):
        DataConfig(reward_column="r", chunk_length=8)


@pytest.mark.parametrize("loss", [{"label_smoothing": 0.2}, {"loss_fn": "log_odds"}])
def test_a_plan_names_its_loss_and_queries_use_it(loss, config, tmp_path):
    other = replace(config, **loss)
    plain, found = rows(config, tmp_path / "plain"), rows(other, tmp_path / "other")
    assert np.abs(plain - found).max() > 1e-3
    again = score_dataset(tmp_path / "s", ScoreConfig(str(tmp_path / "other")), replace(config, projection_dim=None))
    close(again.scores.block(0, 6), found @ found.T)


def test_kl_to_the_same_model_is_nothing_and_to_another_something(config, folders, tmp_path):
    same = replace(config, loss_fn="kl", reference_model=config.model)
    assert np.abs(rows(same, tmp_path / "same")).max() < 1e-4
    other = replace(same, reference_model=str(folders["gpt2-other"]))
    assert np.abs(rows(other, tmp_path / "other")).max() > 1e-2
    with pytest.raises(ModelError, match="name --reference-model"):
        rows(replace(config, loss_fn="kl"), tmp_path / "none")
    with pytest.raises(AttributionError, match="is what --loss-fn kl compares with"):
        replace(config, reference_model="x")
