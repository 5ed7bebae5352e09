"""Builds under the other sketches: the basis is kept beside the rows, and whoever asks uses the very same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataConfig, IndexConfig, RunError, build_index
from attribute.progress import Quiet
from attribute.query import Asker, QueryConfig
from attribute.spectral import plan_of
from gradcore import Dense, Fidelity, GlobalSketch, Identity, SparseJL, Spectral, TensorSketch, TwoSided, fidelity
from gradstore import GradientStore


@pytest.fixture
def config(folders, documents, tmp_path) -> IndexConfig:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return IndexConfig(
        model=str(folders["gpt2"]),
        sketch_kind="spectral",
        sketch_floats=24,
        rows_per_shard=4,
        data=DataConfig(dataset=str(path)),
    )


def contents(path: Path) -> dict[str, bytes]:
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("kind", ["tensor", "spectral", "dense", "sparse", "global"])
def test_a_row_asked_for_finds_itself(kind, config, tmp_path):
    store = build_index(tmp_path / "run", replace(config, sketch_kind=kind))
    modules = 1 if kind == "global" else len(store.columns)
    assert 24 * (modules - 1) < store.width <= 24 * modules  # shared by modules, a residual rounds down
    assert list(store.columns) == ["global"] if kind == "global" else modules > 1
    text = store.data(3)["text"]
    found = Asker.open(tmp_path / "run").ask([{"text": text}], QueryConfig(top_k=1))
    assert found.proponents(0)[0].text == text
    assert found.proponents(0)[0].score == pytest.approx(1, abs=1e-4)


def test_spectral_rows_are_nearer_to_the_exact_ones(config, tmp_path):
    exact = build_index(tmp_path / "exact", replace(config, sketch_kind="two-sided", projection_dim=0))
    built = {k: build_index(tmp_path / k, replace(config, sketch_kind=k)) for k in ("tensor", "spectral")}
    rows = torch.from_numpy(exact.block(0, exact.rows))
    fit = {kind: fidelity(torch.from_numpy(s.block(0, s.rows)), rows) for kind, s in built.items()}
    assert fit["spectral"].spearman > fit["tensor"].spearman
    assert fit["spectral"].error < fit["tensor"].error


def begin(path: Path, config: IndexConfig, monkeypatch) -> None:
    """A build that stops after two windows."""
    from attribute import index
    from attribute.engine import run_pass

    class Stopped(Exception):
        pass

    def stopping(model, tokens, plan, windows, sinks, **options):
        def some():
            for number, window in enumerate(windows):
                if number == 2:
                    raise Stopped
                yield window

        run_pass(model, tokens, plan, some(), sinks, **options)

    with monkeypatch.context() as patched:
        patched.setattr(index, "run_pass", stopping)
        with pytest.raises(Stopped):
            build_index(path, config)


def test_a_stopped_build_goes_on_in_its_own_basis(config, tmp_path, monkeypatch):
    whole = build_index(tmp_path / "whole", config)
    begin(tmp_path / "begun", config, monkeypatch)
    monkeypatch.setattr("attribute.index.fit_basis", lambda *_, **__: pytest.fail("fitted again"))
    begun = build_index(tmp_path / "begun", config)
    np.testing.assert_array_equal(begun.block(0, begun.rows), whole.block(0, whole.rows))
    assert plan_of(begun) == plan_of(whole)


def test_a_missing_or_foreign_basis_is_named(config, tmp_path):
    build_index(tmp_path / "run", config)
    build_index(tmp_path / "other", replace(config, modules=("*mlp*",)))
    basis = tmp_path / "run" / "basis.safetensors"
    assert isinstance(plan_of(GradientStore.open(tmp_path / "run")).sketch, Spectral)
    basis.write_bytes((tmp_path / "other" / "basis.safetensors").read_bytes())
    with pytest.raises(RunError, match="different bases cannot be compared"):
        plan_of(GradientStore.open(tmp_path / "run"))
    basis.write_bytes(b"torn")
    with pytest.raises(RunError, match="is not the basis of this run"):
        plan_of(GradientStore.open(tmp_path / "run"))
    basis.unlink()
    with pytest.raises(RunError, match=r"basis\.safetensors is missing"):
        plan_of(GradientStore.open(tmp_path / "run"))


def test_what_a_sketch_keeps_is_measured_and_said(config, tmp_path):
    """The note and the file say what comparing the finished rows with exact ones says, up to the choice of rows."""
    notes: list[str] = []

    class Noting(Quiet):
        def note(self, text: str) -> None:
            notes.append(text)

    found = {}
    for kind in ("spectral", "tensor", "dense"):
        store = build_index(tmp_path / kind, replace(config, sketch_kind=kind), progress=Noting())
        found[kind] = store.meta["fidelity"]
        assert notes[-1] == f"fidelity of the sketch: {Fidelity(**found[kind])}"
    exact = build_index(tmp_path / "exact", replace(config, sketch_kind="", projection_dim=0), progress=Noting())
    assert exact.meta["fidelity"] is None
    rows, sketched = (torch.from_numpy(s.block(0, s.rows)) for s in (exact, GradientStore.open(tmp_path / "tensor")))
    order = shuffled_rows_of(exact)[::-1][:24].copy()
    want = fidelity(sketched[order], rows[order])
    assert found["tensor"]["spearman"] == pytest.approx(want.spearman, abs=0.02)
    assert found["tensor"]["error"] == pytest.approx(want.error, rel=0.02)
    assert found["spectral"]["error"] < found["tensor"]["error"]


def shuffled_rows_of(store: GradientStore) -> np.ndarray:
    losses = store.side("loss")
    return np.random.default_rng(0).permutation(np.flatnonzero(losses > 0))


@pytest.mark.parametrize(("kind", "budget"), [("tensor", "energy"), ("sparse", "shape"), ("spectral", "equal")])
def test_modules_share_floats_as_asked(kind, budget, config, tmp_path, monkeypatch):
    asked = replace(config, sketch_kind=kind, sketch_floats=64, sketch_budget=budget)
    store = build_index(tmp_path / "run", asked)
    counts = set(plan_of(store).columns.values())
    assert len(counts) == 1 if budget == "equal" else len(counts) > 1
    assert store.width <= 64 * len(store.columns)
    text = store.data(3)["text"]
    assert Asker.open(tmp_path / "run").ask([{"text": text}], QueryConfig(top_k=1)).proponents(0)[0].text == text

    begin(tmp_path / "begun", asked, monkeypatch)
    monkeypatch.setattr("attribute.index.share_by_energy", lambda *_, **__: pytest.fail("shared again"))
    assert plan_of(build_index(tmp_path / "begun", asked)) == plan_of(store)


def test_budgets_a_sketch_cannot_have_are_refused():
    with pytest.raises(AttributionError, match="spectral shares floats by energy or equally"):
        IndexConfig(sketch_budget="shape")
    with pytest.raises(AttributionError, match="--sketch-budget energy needs --sketch spectral, tensor"):
        IndexConfig(projection_dim=16, sketch_budget="energy")
    with pytest.raises(AttributionError, match="--sketch-budget must be one of equal, shape, energy"):
        IndexConfig(sketch_budget="lots")


def test_too_few_rows_are_not_measured(config, tmp_path):
    few = replace(config, sketch_kind="tensor", data=replace(config.data, split="train[:2]"))
    assert build_index(tmp_path / "few", few).meta["fidelity"] is None


def test_the_default_is_spectral_and_a_side_means_two_sided():
    assert isinstance(IndexConfig().sketch, Spectral)
    assert IndexConfig(projection_dim=8).sketch == TwoSided(8)
    assert IndexConfig(projection_dim=0).sketch == Identity()
    assert IndexConfig(sketch_kind="two-sided").sketch == TwoSided(16)
    assert IndexConfig().two_sided().sketch == TwoSided(16)
    assert IndexConfig(projection_dim=0).two_sided().sketch == Identity()
    kinds = {"tensor": TensorSketch, "dense": Dense, "sparse": SparseJL, "global": GlobalSketch, "spectral": Spectral}
    for name, kind in kinds.items():
        assert IndexConfig(sketch_kind=name, sketch_floats=64, projection_seed=3).sketch == kind(64, seed=3)


def test_other_sketches_are_refused():
    with pytest.raises(AttributionError, match="--sketch must be one of spectral, tensor, two-sided"):
        IndexConfig(sketch_kind="fourier")
    with pytest.raises(AttributionError, match="--sketch-floats must be at least 2"):
        IndexConfig(sketch_floats=1)
    with pytest.raises(AttributionError, match="--sketch tensor has --sketch-floats"):
        IndexConfig(sketch_kind="tensor", projection_dim=8)
