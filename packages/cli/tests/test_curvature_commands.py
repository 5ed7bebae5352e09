"""preconditioners, hessian, trackstar and method, as a person types them."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def both(models, dataset):
    return [
        "--model",
        models["neox"],
        "--data.dataset",
        dataset,
        "--query.dataset",
        dataset,
        "--query.split",
        "train[:2]",
    ]


def test_preconditioners_of_a_dataset_and_of_an_index_agree(trace, models, dataset, index, tmp_path):
    options = ["--model", models["neox"], "--dataset", dataset, "--truncation", "--projection_dim", 4]
    one = trace("preconditioners", tmp_path / "a", *options, "--json").json
    two = trace("preconditioners", tmp_path / "b", "--index", index, "--json").json
    assert one["rows"] == two["rows"]
    for name, spectrum in one["spectrum"].items():
        assert spectrum["mean"] == pytest.approx(two["spectrum"][name]["mean"], rel=1e-4)
    assert trace("preconditioners", tmp_path / "a", *options).code == 1  # holds one already
    assert trace("--config", tmp_path / "a" / "config.yaml").code == 1


def test_hessian_keeps_whole_gradients_unless_told(trace, models, dataset, tmp_path):
    options = ["--model", models["neox"], "--dataset", dataset, "--truncation"]
    whole = trace("hessian", tmp_path / "a", *options, "--method", "kfac", "--json").json
    small = trace("hessian", tmp_path / "b", *options, "--ev_correction", "--projection_dim", 2, "--json").json
    assert {each["size"] for each in small["spectrum"].values()} == {4}
    assert min(each["size"] for each in whole["spectrum"].values()) > 4
    refused = trace("hessian", tmp_path / "c", *options, "--method", "tkfac", "--ev-correction")
    assert refused.code == 2
    assert "corrects kfac and shampoo" in refused.err


def test_trackstar_finds_the_query_itself(trace, both, tmp_path):
    found = trace(
        "trackstar", tmp_path / "run", *both, "--data.truncation", "--query.truncation", "--projection_dim", 4, "--json"
    ).json
    for each in found["queries"]:
        assert each["proponents"][0]["text"] == each["text"]
        assert each["proponents"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert trace("trackstar", tmp_path / "x", *both[:4]).code == 2


def test_method_by_name(trace, both, tmp_path):
    found = trace(
        "method", "grad-cos", tmp_path / "run", *both, "--data.truncation", "--query.truncation", "--json"
    ).json
    for each in found["queries"]:
        assert each["proponents"][0]["text"] == each["text"]
    assert "ek-fac" in trace("method", "list").out
    wrong = trace("method", "ekfac", tmp_path / "y", *both)
    assert wrong.code == 1
    assert "did you mean ek-fac" in wrong.err
    refused = trace("method", "tracin", tmp_path / "z", *both, "--data.truncation", "--query.truncation")
    assert refused.code == 1
    assert "checkpoints" in refused.err


def test_an_optimiser_steers_the_methods_that_move_as_it_does(trace, both, models, tmp_path):
    """Its moments for adam-cg, with the horizon, and for less, where they lie beside a checkpoint."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(models["neox"], tmp_path / "trained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "trained" / "optimizer.pt")
    words = [*both, "--data.truncation", "--query.truncation", "--json"]
    solver = ["--solver-rows", 2, "--solver-steps", 2]
    state = ["--optimizer-state-path", tmp_path / "trained"]

    def scores(number, name, *more):
        told = trace("method", name, tmp_path / f"run{number}", *words, *more)
        assert told.code == 0, told.err
        found = told.json["queries"][0]
        return [each["score"] for each in found["proponents"]]

    worked_out = scores(0, "adam-cg", *solver, "--horizon", 0.03, "--train-batch-size", 2)
    given = scores(1, "adam-cg", *solver, *state, "--horizon", 0.03)
    assert worked_out != pytest.approx(given)
    checkpoints = [
        scores(2 + n, "less", "--checkpoint", f"{m}=1.0") for n, m in enumerate([models["neox"], tmp_path / "trained"])
    ]
    assert checkpoints[0] != pytest.approx(checkpoints[1])
    refused = trace("method", "adam-cg", tmp_path / "x", *words, *solver, *state)
    assert (refused.code, "--horizon" in refused.err) == (1, True)
    # Two steps at .01 and .02: the trainer logged them.
    log = [{"step": 1, "learning_rate": 0.01}, {"step": 2, "learning_rate": 0.02}, {"step": 2, "eval_loss": 1.0}]
    (tmp_path / "trained" / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": log}))
    assert scores(9, "adam-cg", *solver, *state) == pytest.approx(given)
