"""Options of method and trackstar, as a person types them: used, or refused with the methods that use them."""

from __future__ import annotations

import pytest
import yaml


@pytest.fixture
def both(models, dataset):
    data = ["--data.dataset", dataset, "--data.truncation", "--data.split", "train[:9]"]
    query = ["--query.dataset", dataset, "--query.truncation", "--query.split", "train[10:12]"]
    return ["--model", models["neox"], *data, *query]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ek-fac", "--normalizer", "none"], "--normalizer does nothing for ek-fac: leave it away (it is for precond"),
        (["grad-dot", "--damping", 0.1], "--damping does nothing for grad-dot"),
        (["grad-dot", "--seed", 0], "--seed does nothing for grad-dot"),
        (["lissa", "--projection-dim", 8], "--projection-dim does nothing for lissa: leave it away (it is for ek-fac-"),
        (["ek-fac-sketched", "--projection-type", "normal"], "--projection-type does nothing"),
        (["ek-fac", "--query.group-column", "text"], "--query.group-column does nothing for ek-fac"),
        (["trackstar", "--nearest"], "--nearest does nothing for trackstar: leave it away (it is for less)"),
        (["bm25", "--query.advantage-column", "r"], "--query.advantage-column does nothing for bm25"),
        (["adam-cg", "--use-dataset-labels", "--damping", 1], "--damping does nothing for adam-cg"),
        (["trackstar", "--projection-dim", 0], "trackstar needs a sketch: --projection-dim must be 1 or more"),
        (["lissa", "--damping", -0.5], "--damping must be 0 or positive, not -0.5"),
        (["ek-fac-cg", "--solver-rows", -3], "--solver-rows must be at least 0, not -3"),
        (["grad-dot", "--top-k", 0], "--top-k must be at least 1, not 0"),
        (["tracin", "--checkpoint", "{model}=nan"], "the learning rate of a --checkpoint must be positive, not nan"),
    ],
)
def test_an_option_without_a_use_or_out_of_range_is_refused(words, message, trace, both, models, tmp_path):
    words = [str(each).replace("{model}", str(models["neox"])) for each in words]
    refused = trace("method", words[0], tmp_path / "run", *both, *words[1:])
    assert refused.code == 1
    assert message in refused.err
    assert not (tmp_path / "run").exists()


def test_a_saved_configuration_is_checked_like_a_command_line(trace, both, tmp_path):
    assert trace("method", "grad-dot", tmp_path / "run", *both, "--projection-dim", 0).code == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    saved["options"]["run_path"] = str(tmp_path / "again")
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(saved))
    assert trace("--config", file).code == 0
    saved["options"] |= {"run_path": str(tmp_path / "third"), "damping": 5.0}
    file.write_text(yaml.safe_dump(saved))
    refused = trace("--config", file)
    assert refused.code == 1
    assert "--damping does nothing for grad-dot" in refused.err


def test_less_is_nearest_over_sub_tasks_in_one_command(trace, both, models, tmp_path):
    words = ["--projection-dim", 4, "--checkpoint", f"{models['neox']}=0.1", "--checkpoint", f"{models['other']}=0.3"]
    apart = trace("method", "less", tmp_path / "a", *both, *words, "--query.group-column", "text", "--json").json
    assert len(apart["queries"]) == 2
    assert apart["queries"][0]["text"].endswith("(1 queries)")
    near = trace("method", "less", tmp_path / "b", *both, *words, "--query.group-column", "text", "--nearest", "--json")
    (found,) = near.json["queries"]
    assert found["text"] == "nearest of 2 sub-tasks"
    best = max(each["proponents"][0]["score"] for each in apart["queries"])
    assert found["proponents"][0]["score"] == pytest.approx(best)


def test_trackstar_has_the_normaliser_of_its_paper_unless_told(trace, both, tmp_path):
    both = [*both, "--projection-dim", 4, "--json"]

    def scores(number, *more):
        done = trace("trackstar", tmp_path / f"run{number}", *both, *more)
        assert done.code == 0, done.err
        return [[each["score"] for each in query["proponents"]] for query in done.json["queries"]], done.err

    default, told = scores(0)
    assert "normaliser: adafactor, with second moments fitted to the rows" in told
    asked, told = scores(1, "--normalizer", "adafactor")
    assert asked == default
    assert "normaliser:" not in told
    none, told = scores(2, "--normalizer", "none")
    assert none != default
    assert "normaliser:" not in told
    taken, told = scores(3, "--processor-path", tmp_path / "run0" / "index")
    assert taken == default
    assert "normaliser:" not in told
    refused = trace("trackstar", tmp_path / "x", *both, "--top-k", 0)
    assert (refused.code, "--top-k must be at least 1" in refused.err) == (1, True)


def test_the_list_of_methods_says_what_can_be_set(trace):
    found = {each["name"]: each["options"] for each in trace("method", "list", "--json").json}
    assert found["bm25"] == []
    assert "--nearest" in found["less"]
    assert "--projection-seed" in found["trackstar"]
