"""Normalisers of runs: fitted, taken from an optimiser or from another run, and the same on both sides."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataConfig, IndexConfig, RunError, build_index
from attribute.curvature import fit_preconditioners, trackstar
from attribute.data import open_source
from attribute.index import tokenise
from attribute.model import load_model, load_tokenizer
from attribute.normalizing import NORMALIZER, fit_normalizer, load_normalizer
from attribute.progress import Quiet
from attribute.query import Asker, QueryConfig
from attribute.spectral import plan_of
from gradcore import optimizer_moments

KINDS = ("adam", "adafactor", "shampoo")


@pytest.fixture
def config(folders, documents, tmp_path) -> IndexConfig:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return IndexConfig(model=str(folders["gpt2"]), projection_dim=0, data=DataConfig(dataset=str(path)))


def test_fitted_moments_are_the_mean_squared_gradients(config, tmp_path):
    """Built whole, the rows give the moments by hand; under adam every stored row is its gradient over their root."""
    plain = build_index(tmp_path / "plain", config)
    scaled = build_index(tmp_path / "scaled", replace(config, normalizer="adam"))
    rows = plain.block(0, plain.rows).astype(np.float64)
    expected = rows / (np.sqrt((rows**2).mean(0)) + 1e-8)
    found = scaled.block(0, scaled.rows)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sketch", ["spectral", "tensor", "two-sided"])
def test_a_row_asked_for_finds_itself(kind, sketch, config, tmp_path):
    build = replace(config, normalizer=kind, sketch_kind=sketch, projection_dim=4 if sketch == "two-sided" else None)
    store = build_index(tmp_path / "run", replace(build, sketch_floats=24))
    text = store.data(3)["text"]
    hit = Asker.open(tmp_path / "run").ask([{"text": text}], QueryConfig(top_k=1)).proponents(0)[0]
    assert (hit.text, hit.score) == (text, pytest.approx(1, abs=1e-3))
    assert plan_of(store).normalizer == load_normalizer(tmp_path / "run")


def test_moments_do_not_depend_on_batches(config, tmp_path):
    model = load_model(config.model)
    tokenizer, source = load_tokenizer(config.model), open_source(config.data)
    tokens, plan = tokenise(tmp_path, source, tokenizer, config, model, Quiet()), model.plan(config)
    one, other = (fit_normalizer(model, tokens, plan, "adam", budget=budget) for budget in (1, 4096))
    for name, scale in one.scales.items():
        torch.testing.assert_close(scale.dense, other.scales[name].dense, rtol=1e-3, atol=0)


def test_an_optimisers_moments_are_taken_by_name(config, tmp_path):
    """The state of the model's own training, as the Trainer saves it: two groups, no names."""
    model = load_model(config.model)
    named = dict(model.model.named_parameters())
    free = [name for name in named if "bias" in name or "ln_" in name]
    groups = [{"params": [named[n] for n in named if n not in free]}, {"params": [named[n] for n in free]}]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for parameter in named.values():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    build = replace(config, normalizer="adam", optimizer_state_path=str(tmp_path))
    plan = plan_of(build_index(tmp_path / "run", build))
    live = optimizer_moments(model.model, optimizer, within=model.base)
    for each in plan.modules:
        expected = 1 / (live[each.name][:, : each.in_features].sqrt() + 1e-8)
        torch.testing.assert_close(plan.normalizer.scales[each.name].dense, expected)


def test_a_processor_hands_its_normaliser_on(config, tmp_path):
    fit = replace(config, normalizer="adafactor", projection_dim=4)
    gram = fit_preconditioners(tmp_path / "processor", fit)
    store = build_index(tmp_path / "run", replace(fit, normalizer="", processor_path=str(tmp_path / "processor")))
    assert plan_of(store).normalizer == load_normalizer(tmp_path / "processor")
    rows = torch.from_numpy(store.block(0, store.rows)).double()
    first = next(iter(plan_of(store).slices))
    block = rows[:, plan_of(store).slices[first]]
    assert gram.plan.normalizer == plan_of(store).normalizer
    moment = (gram.vectors[first] * gram.values[first]) @ gram.vectors[first].T
    torch.testing.assert_close(moment, block.T @ block / gram.rows, rtol=1e-3, atol=1e-5)
    with pytest.raises(RunError, match="holds the normaliser adafactor, not adam"):
        build_index(tmp_path / "other", replace(fit, normalizer="adam", processor_path=str(tmp_path / "processor")))
    with pytest.raises(RunError, match="holds no normaliser"):
        build_index(tmp_path / "other", replace(fit, processor_path=str(tmp_path)))


def test_both_sides_of_trackstar_share_one(config, tmp_path):
    found = trackstar(tmp_path / "run", replace(config, normalizer="adafactor", projection_dim=4), config.data, top_k=1)
    plans = [plan_of(store) for store in (found.index, found.queries)]
    assert plans[0] == plans[1]
    assert plans[0].normalizer.kind == "adafactor"
    assert (found.hits.top_rows[:, 0] == np.arange(found.queries.rows)).mean() > 0.8  # copies of a text tie


def test_a_lost_or_changed_normaliser_is_refused(config, tmp_path):
    build_index(tmp_path / "run", replace(config, normalizer="adafactor"))
    file = tmp_path / "run" / NORMALIZER
    kept = file.read_bytes()
    file.write_bytes(kept[:-4] + b"\0\0\0\1")
    with pytest.raises(RunError, match="torn or changed"):
        Asker.open(tmp_path / "run")
    file.unlink()
    with pytest.raises(RunError, match="is missing"):
        Asker.open(tmp_path / "run")


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(AttributionError, match="normalizer must be one of"):
        IndexConfig(normalizer="lion")
    with pytest.raises(AttributionError, match="needs --normalizer"):
        IndexConfig(optimizer_state_path="x")
    with pytest.raises(AttributionError, match="leave --optimizer-state-path away"):
        IndexConfig(normalizer="adam", optimizer_state_path="x", processor_path="y")
