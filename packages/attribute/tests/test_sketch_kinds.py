"""Builds under the other sketches: the basis is kept beside the rows, and whoever asks uses the very same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataConfig, IndexConfig, RunError, build_index
from attribute.query import Asker, QueryConfig
from attribute.spectral import plan_of
from gradcore import Spectral, fidelity
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


@pytest.mark.parametrize("kind", ["tensor", "spectral"])
def test_a_row_asked_for_finds_itself(kind, config, tmp_path):
    store = build_index(tmp_path / "run", replace(config, sketch_kind=kind))
    modules = len(store.columns)
    assert store.width == 24 * modules
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


def test_a_stopped_build_goes_on_in_its_own_basis(config, tmp_path, monkeypatch):
    from attribute import index
    from attribute.engine import run_pass

    whole = build_index(tmp_path / "whole", config)

    class Stopped(Exception):
        pass

    def stopping(model, tokens, plan, windows, sinks, **options):
        def some():
            for number, window in enumerate(windows):
                if number == 2:
                    raise Stopped
                yield window

        run_pass(model, tokens, plan, some(), sinks, **options)

    monkeypatch.setattr(index, "run_pass", stopping)
    with pytest.raises(Stopped):
        build_index(tmp_path / "begun", config)
    monkeypatch.setattr(index, "run_pass", run_pass)
    monkeypatch.setattr(index, "fit_basis", lambda *_, **__: pytest.fail("fitted again"))
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


def test_other_sketches_are_refused():
    with pytest.raises(AttributionError, match="--sketch must be one of two-sided, tensor, spectral"):
        IndexConfig(sketch_kind="dense")
    with pytest.raises(AttributionError, match="--sketch-floats must be at least 2"):
        IndexConfig(sketch_floats=1)
