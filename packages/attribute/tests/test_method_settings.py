"""What can be set of a method changes its scores, or is refused; and the settings do what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataConfig, DataError, IndexConfig, LanguageModel
from attribute.data import Row, TokenFile, TokenFileWriter
from attribute.engine import gradients_of
from attribute.influence import run_method
from attribute.methods import OPTIONS, Checkpoint, Study, estimator_named, estimators, require_used
from attribute.progress import Quiet
from gradcore import TwoSided


def token_file(folder: Path, lengths: list[int], start: int) -> TokenFile:
    rows = (
        Row(np.arange(length) * (number + start + 3) % 90 + 2, np.ones(length, dtype=bool), {})
        for number, length in enumerate(lengths)
    )
    return TokenFileWriter(folder, 300).write(rows)


@pytest.fixture(scope="module")
def study(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two modules of a tiny model, six rows and four queries, the first of them empty."""
    root = tmp_path_factory.mktemp("study")
    model, other = (LanguageModel.wrap(make_model("gpt2", seed).eval()) for seed in (0, 1))
    rows = token_file(root / "rows", [5, 12, 9, 4, 14, 7], 0)
    queries = token_file(root / "queries", [0, 8, 11, 6], 7)
    plan = model.plan(IndexConfig(projection_dim=0, modules=("h.0.mlp.c_fc", "h.1.attn.c_proj")))
    texts = [f"row {number} of the sea" for number in range(6)], [f"query of row {number}" for number in range(4)]
    return Study(
        model,
        rows,
        queries,
        plan,
        *texts,
        checkpoints=(Checkpoint(other, 0.5), Checkpoint(model, 0.25)),
        projection_dim=3,
        solver_rows=3,
        solver_steps=2,
        horizon=0.5,
        batch=2,
    )


def moments(study: Study) -> dict[str, torch.Tensor]:
    return {each.path: torch.rand(each.out_features, each.in_features) + 0.1 for each in study.plan.modules}


CHANGES: dict[str, Any] = {
    "modules": lambda s: replace(s, plan=s.plan.restrict("h.0.mlp.c_fc")),
    "loss_reduction": lambda s: replace(s, plan=s.model.plan(_config(loss_reduction="mean"))),
    "include_bias": lambda s: replace(s, plan=s.model.plan(_config(include_bias=True))),
    "projection_dim": lambda s: replace(s, projection_dim=2),
    "projection_type": lambda s: replace(s, projection_type="normal"),
    "projection_seed": lambda s: replace(s, projection_seed=7),
    "normalizer": lambda s: replace(s, normalizer="adam"),
    "moments": lambda s: replace(s, moments=moments(s), batch=0, normalizer="adafactor"),
    "checkpoints": lambda s: replace(s, checkpoints=s.checkpoints[:1]),
    "horizon": lambda s: replace(s, horizon=5.0),
    "batch": lambda s: replace(s, batch=20),
    "damping": lambda s: replace(s, damping=5.0),
    "labels": lambda s: replace(s, labels="dataset"),
    "seed": lambda s: replace(s, seed=7),
    "solver_rows": lambda s: replace(s, solver_rows=0),
    "solver_steps": lambda s: replace(s, solver_steps=4),
    "group_column": lambda s: replace(s, groups=("a", "a", "b", "b")),
    "nearest": lambda s: replace(s, nearest=True),
}


def _config(**options: Any) -> IndexConfig:
    return IndexConfig(projection_dim=0, modules=("h.0.mlp.c_fc", "h.1.attn.c_proj"), **options)


@pytest.mark.parametrize("name", estimators())
def test_every_setting_that_a_method_uses_changes_its_scores(study, name):
    """And those that it does not use change nothing, so that refusing them is right."""
    method = estimator_named(name)
    plain = replace(study, checkpoints=()) if {"moments", "checkpoints"} <= method.uses else study
    base = {False: method.influence(study), True: method.influence(plain)}
    for setting, change in CHANGES.items():
        alone = setting == "moments"
        changed = replace(change(plain if alone else study), _curvatures={})
        if setting in method.uses:
            assert not np.array_equal(method.influence(changed), base[alone]), setting
        elif setting not in ("moments", "normalizer"):  # the normaliser is of all sketches of a study
            assert np.array_equal(method.influence(changed), base[False]), setting


@pytest.mark.parametrize("name", estimators())
def test_what_does_nothing_is_refused_with_the_methods_that_use_it(name):
    method = estimator_named(name)
    for setting, option in OPTIONS.items():
        if setting in method.uses:
            require_used(method, {setting: option})
            continue
        users = [each for each, other in estimators().items() if setting in other.uses]
        with pytest.raises(AttributionError, match=f"{option} does nothing for {name}: .*for {', '.join(users)}"):
            require_used(method, {setting: option})


def test_numbers_out_of_range_are_refused(study):
    for setting, value, option in [
        ("damping", -0.5, "damping"),
        ("damping", float("nan"), "damping"),
        ("solver_rows", -3, "solver-rows"),
        ("solver_steps", -1, "solver-steps"),
        ("projection_dim", 0, "projection-dim"),
        ("seed", -1, "seed"),
        ("horizon", float("inf"), "horizon"),
        ("horizon", -1.0, "horizon"),
        ("batch", -1, "train-batch-size"),
    ]:
        with pytest.raises(AttributionError, match=f"--{option} must be"):
            replace(study, **{setting: value})
    with pytest.raises(AttributionError, match="--checkpoint must be positive, not nan"):
        replace(study, checkpoints=(Checkpoint(study.model, float("nan")),))
    with pytest.raises(AttributionError, match="1 sub-tasks are given for 4 queries"):
        replace(study, groups=("a",))


@pytest.mark.parametrize("name", ["lissa", "ek-fac-cg", "trackstar", "trak", "grad-cos"])
def test_an_empty_query_in_front_leaves_the_others_as_they_are(study, name, tmp_path):
    method = estimator_named(name)
    without = replace(study, queries=token_file(tmp_path / "q", [8, 11, 6], 8), query_texts=study.query_texts[1:])
    found, expected = method.influence(study), method.influence(without)
    assert np.isfinite(found).all()
    assert (found[0] == 0).all()
    np.testing.assert_allclose(found[1:], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    if name != "trackstar":  # which has no curvature of queries without any gradient
        nothing = replace(study, queries=token_file(tmp_path / "none", [0, 1], 0))
        assert (method.influence(nothing) == 0).all()


def nearest_reference(study: Study, groups: list[str]) -> np.ndarray:
    """max_task Σ_c η_c cos(Π mean_task g, Π Γ_i), Γ_i = g_i / (√v + ε): Xia et al. 2024, section 4."""
    tasks: dict[str, np.ndarray] = {}
    for checkpoint in study.checkpoints:
        plain = replace(study.plan, model="")
        whole, queries = (gradients_of(checkpoint.model, side, plain) for side in (study.rows, study.queries))
        sketched = [np.empty((len(side), 0)) for side in (whole, queries)]
        for each, columns in zip(plain.modules, plain.slices.values()):
            sketch = TwoSided(study.projection_dim)
            left = sketch.matrix(each.name, "left", each.out_features).numpy()
            right = sketch.matrix(each.name, "right", each.in_features).numpy()
            adam = whole[:, columns] / (np.sqrt(np.square(whole[:, columns]).mean(0)) + 1e-8)
            for place, side in enumerate((adam, queries[:, columns])):
                formed = side.reshape(len(side), each.out_features, each.in_features)
                made = left @ formed @ right.T
                sketched[place] = np.concatenate([sketched[place], made.reshape(len(side), -1)], 1)
        rows = sketched[0] / np.linalg.norm(sketched[0], axis=1, keepdims=True)
        for group in dict.fromkeys(groups):
            mean = sketched[1][[each == group for each in groups]].mean(0)
            tasks[group] = tasks.get(group, 0) + checkpoint.learning_rate * rows @ (mean / np.linalg.norm(mean))
    return np.max(list(tasks.values()), axis=0)


def test_less_is_nearest_over_sub_tasks(study):
    groups = ["sums", "sums", "tales", "sums"]
    found = estimator_named("less").influence(replace(study, groups=groups, nearest=True))
    assert found.shape == (1, 6)
    np.testing.assert_allclose(found[0], nearest_reference(study, groups), rtol=1e-3, atol=1e-5)
    apart = estimator_named("less").influence(replace(study, groups=groups))
    assert apart.shape == (2, 6)
    assert np.array_equal(apart.max(0), found[0])
    each = estimator_named("less").influence(study)  # without groups every query is a task; the empty one asks nothing
    alone = estimator_named("less").influence(replace(study, nearest=True))
    assert np.array_equal(alone[0], each[1:].max(0))


def test_trackstar_has_the_normaliser_of_its_paper(study):
    method = estimator_named("trackstar")
    default = method.influence(study)
    assert np.array_equal(default, method.influence(replace(study, normalizer="adafactor")))
    assert not np.allclose(default, method.influence(replace(study, normalizer="none")))


def test_trak_weighs_the_gradients_of_rows(study, tmp_path):
    """A row of weight 0 is nowhere; all weights alike leave R⁻¹ to take one of the two factors back."""
    rows = token_file(tmp_path / "rows", [5, 12, 9, 4, 14, 7], 0)
    plain = estimator_named("trak").influence(replace(study, rows=rows))
    rows.weigh(np.full(6, -2.0))
    np.testing.assert_allclose(estimator_named("trak").influence(replace(study, rows=rows)), plain / -2, rtol=2e-3)
    rows.weigh(np.array([0, 1, 1, 1, 1, 1]))
    found = estimator_named("trak").influence(replace(study, rows=rows))
    assert (found[:, 0] == 0).all()
    others = TokenFileWriter(tmp_path / "others", 300).write(
        Row(rows.ids(row), np.ones(len(rows.ids(row)), dtype=bool), {}) for row in range(1, 6)
    )
    expected = estimator_named("trak").influence(replace(study, rows=others, texts=study.texts[1:]))
    np.testing.assert_allclose(found[:, 1:], expected, rtol=2e-3, atol=1e-5)


@pytest.fixture
def asked(folders, documents, tmp_path) -> tuple[IndexConfig, DataConfig]:
    for name, texts in (("train", documents[:9]), ("query", documents[10:14])):
        lines = (json.dumps({"text": text, "task": "ab"[n % 2]}) for n, text in enumerate(texts))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    train, query = (DataConfig(dataset=str(tmp_path / f"{name}.jsonl")) for name in ("train", "query"))
    return IndexConfig(model=str(folders["gpt2"]), modules=("h.1.*",), data=train), query


def test_a_run_says_what_its_columns_are(asked, tmp_path):
    config, query = asked
    found = run_method(tmp_path / "tasks", "less", config, query, group_column="task")
    assert list(found.query_texts) == ["a (2 queries)", "b (2 queries)"]
    found = run_method(tmp_path / "nearest", "less", config, query, group_column="task", nearest=True)
    assert [each["query"] for each in found.answer()["queries"]] == [0]
    assert found.scores.provenance["columns"] == ["nearest of 2 sub-tasks"]
    with pytest.raises(DataError, match=r"query 0 has no column 'kind' .*only text, task"):
        run_method(tmp_path / "x", "less", config, query, group_column="kind")


def test_a_run_refuses_what_its_method_has_no_use_for(asked, tmp_path):
    config, query = asked
    for name, other, options, reason in [
        ("grad-dot", {}, {"damping": 5.0}, "--damping does nothing for grad-dot"),
        ("ek-fac", {}, {"checkpoints": [(config.model, 1.0)]}, "--checkpoint does nothing"),
        ("ek-fac", {"normalizer": "adam"}, {}, "--normalizer does nothing"),
        ("lissa", {"projection_dim": 8}, {}, "--projection-dim does nothing"),
        ("bm25", {}, {}, "--modules does nothing for bm25"),
        ("bm25", {"modules": (), "data": replace(config.data, advantage_column="r")}, {}, "--data.reward-column does"),
        ("trackstar", {"projection_dim": 0}, {}, "trackstar needs a sketch: --projection-dim must be 1 or more"),
        ("preconditioned-if", {}, {"optimizer_state": config.model}, "second moments of a normaliser"),
        ("grad-dot", {}, {"top_k": 0}, "--top-k must be at least 1"),
    ]:
        with pytest.raises(AttributionError, match=reason):
            run_method(tmp_path / "x", name, replace(config, **other), query, **options)
    assert not (tmp_path / "x").exists()


def test_few_queries_are_noted_and_the_moments_of_a_checkpoint_taken(asked, tmp_path):
    import shutil

    from transformers import AutoModelForCausalLM

    notes = list[str]()

    class Notes(Quiet):
        def note(self, message: str) -> None:
            notes.append(message)

    config, query = asked
    shutil.copytree(config.model, tmp_path / "trained")
    config = replace(config, model=str(tmp_path / "trained"))

    def scores(name: str, **options: Any) -> np.ndarray:
        notes.clear()
        return run_method(tmp_path / name, "trackstar", config, query, progress=Notes(), **options).scores.block(0, 9)

    fitted = scores("fitted")
    assert any("λ = 0.000" in note and "too few queries" in note for note in notes)
    assert any(note == "normaliser: adafactor, with second moments fitted to the rows" for note in notes)
    model = AutoModelForCausalLM.from_pretrained(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "trained" / "optimizer.pt")
    beside = scores("beside")
    assert any("optimizer.pt (--normalizer adafactor fits them instead)" in note for note in notes)
    assert not np.allclose(beside, fitted)
    none = scores("none", normalize=False)
    assert not any("normaliser" in note for note in notes)
    assert not np.allclose(none, beside)
    config = replace(config, normalizer="adafactor")
    assert np.array_equal(scores("asked"), fitted)
