"""`trace probe`: what its options accept, what lands in --out, and how an interrupted run goes on."""

import json
import re
import shutil

import click
import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from zoo import save_worded_gpt2

from probing import Masks, _configs, _options, _sites
from probing.cli import probe

WORDS = ["[PAD]", "[UNK]", "the", "man", "men", "dog", "dogs", "near", "is", "are", ".", "The"]
NOUNS = {"man": 0, "men": 10, "dog": 0, "dogs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    save_worded_gpt2(where, WORDS, 8)
    rows = []
    for number, noun in enumerate(list(NOUNS) * 12):
        rows.append(
            {"text": f"the {noun} near the dog .", "noun": noun, "number": NOUNS[noun], "plural": noun[-1] == "s"}
        )
        rows[-1]["other"] = ["a", "b"][number % 3 == 0]
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


def run(*arguments):
    return CliRunner().invoke(probe, [str(a) for a in arguments])


def task(folder, label="number"):
    return [folder, folder / "rows.jsonl", "--label", label, "--position", "word:noun"]


TRAIN = ["--readout", "mlp_update_0", "--epochs", 5, "--batch-size", 8, "--lr", 0.05]


def test_choices_are_those_of_the_library():
    assert _options.UNITS == _sites.UNITS
    assert list(_options.METHODS) == list(_configs._RULE_OPTIONS)


@pytest.mark.parametrize("command", ["circuit", "subnetwork", "linear", "evaluate"])
def test_help_names_every_unit_and_fits_its_lines(command):
    found = CliRunner().invoke(probe, [command, "--help"], terminal_width=110)
    assert found.exit_code == 0
    if command in ("circuit", "subnetwork"):
        assert all(unit in found.output for unit in _options.UNITS)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("circuit", ["--unit", "neurone"]),
        ("circuit", ["--method", "magic"]),
        ("circuit", ["--epochs", 0]),
        ("circuit", ["--batch-size", 1]),
        ("circuit", ["--lr", -1]),
        ("circuit", ["--lr", 0]),
        ("circuit", ["--lr", "nan"]),
        ("circuit", ["--lr", "inf"]),
        ("circuit", ["--l0-lambda", -5]),
        ("circuit", ["--l0-lambda", "nan"]),
        ("circuit", ["--target-sparsity", 1]),
        ("circuit", ["--test-share", 2]),
        ("circuit", ["--test-share", 0]),
        ("circuit", ["--seed", -1]),
        ("circuit", ["--missing", "drop"]),
        ("circuit", ["--max-length", 0]),
        ("circuit", ["--max-length", 9]),
        ("circuit", ["--precision", "int8"]),
        ("circuit", ["--label", "noun", "--unit", "expert"]),
        ("subnetwork", ["--hidden", 0]),
        ("linear", ["--hidden", -3]),
        ("linear", ["--epochs", 0]),
        ("evaluate", ["--controls", -1]),
        ("evaluate", ["--pool", "bogus"]),
        ("evaluate", ["--how", "bogus"]),
        ("evaluate", ["--space", "bogus"]),
        ("evaluate", ["--answers", " is, are,"]),
        ("evaluate", ["--answers", " is, is, are"]),
    ],
)
def test_values_that_mean_nothing_are_refused_by_the_option(folder, tmp_path, command, arguments):
    needed = {
        "circuit": [*TRAIN, "--out", tmp_path / "out"],
        "subnetwork": [*TRAIN, "--out", tmp_path / "out"],
        "linear": ["--readout", "mlp_update_0"],
        "evaluate": ["--masks", tmp_path / "none", "--answers", " is, are, near"],
    }[command]
    found = run(command, *task(folder), *needed, *arguments)
    assert found.exit_code == 2, found.output
    assert str(arguments[-2]) in found.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "a", "file is a file")):
        found = run("circuit", "nowhere", folder / "rows.jsonl", "--label", "number", *TRAIN, "--out", out)
        assert found.exit_code == 2
        assert message in " ".join(found.output.split())


def is_estimate(value):
    return sorted(value) == ["high", "low", "mean"] and all(isinstance(each, float) for each in value.values())


def test_a_circuit_and_its_ablation_are_numbers_in_json(folder, tmp_path):
    out = tmp_path / "run"
    found = run("circuit", *task(folder), *TRAIN, "--l0-lambda", 0, "--out", out, "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert json.loads((out / "result.json").read_text()) == result
    assert result["classes"] == ["0", "2", "10"]
    assert is_estimate(result["knn circuit"])
    masks = Masks.load(out / "masks")
    assert result["units kept"] == {"kept": masks.size, "of": masks.total}
    asked = ["--masks", out / "masks", "--answers", " is, are, near", "--controls", 3, "--pool", "all"]
    found = run("evaluate", *task(folder), *asked, "--json", "--out", tmp_path / "effect")
    assert found.exit_code == 0, found.output
    effect = json.loads(found.stdout)
    assert json.loads((tmp_path / "effect" / "result.json").read_text()) == effect
    assert effect["answers"] == {"0": " is", "2": " are", "10": " near"}
    assert is_estimate(effect["whole model"])
    assert isinstance(effect["p"], float)
    assert "undefined" not in effect
    assert (tmp_path / "effect" / "report.html").read_text().count("<svg") == 1
    text = run("evaluate", *task(folder), *asked).stdout
    assert re.search(r"^answers +0= is, 2= are, 10= near$", text, re.M)
    assert re.search(r"^whole model +\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]$", text, re.M)
    by_label = [*asked[:3], "10= near,0= is,2= are", *asked[4:]]
    assert run("evaluate", *task(folder), *by_label).stdout == text


def test_no_controls_are_undefined_with_the_reason(folder, tmp_path):
    circuit = Masks.of(
        tf.AutoModelForCausalLM.from_pretrained(folder),
        {"transformer.h.0.mlp.c_fc": torch.arange(128) < 100},
    )
    circuit.save(tmp_path / "large")
    asked = ["--masks", tmp_path / "large", "--answers", " is, are, near"]
    for more, reason in {
        ("--controls", 0): "--controls 0 asks for no random circuits",
        ("--controls", 2): "keeps 78%); --pool all draws from all units",
    }.items():
        text = run("evaluate", *task(folder), *asked, *more).stdout
        assert re.search(rf"^drop of random circuits +undefined: .*{re.escape(reason)}$", text, re.M)
        effect = json.loads(run("evaluate", *task(folder), *asked, *more, "--json").stdout)
        assert [effect[name] for name in ("drop of random circuits", "owed to the circuit", "p")] == [None] * 3
        assert reason in effect["undefined"]["drop of random circuits"]


def test_masks_found_on_other_weights_are_taken_when_asked(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    Masks.of(model, {"transformer.h.0.mlp.c_fc": torch.arange(128) < 10}).save(tmp_path / "masks")
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_fc.weight)
    model.save_pretrained(other)
    asked = ["--masks", tmp_path / "masks", "--answers", " is, are, near", "--controls", 1]
    found = run("evaluate", *task(other), *asked)
    assert found.exit_code == 1
    assert "type --any-weights" in found.output
    assert "same_weights" not in found.output
    assert run("evaluate", *task(other), *asked, "--any-weights").exit_code == 0


def test_a_probe_of_one_token_has_no_control_task(folder, tmp_path):
    asked = [*task(folder)[:-1], "last", "--readout", "resid_out_0", "--epochs", 2]
    text = run("linear", *asked).stdout
    assert re.search(r"^control task \(by token\) +undefined: every row's probed token is the same", text, re.M)
    assert re.search(r"^selectivity +undefined$", text, re.M)
    found = run("linear", *asked, "--json", "--out", tmp_path / "out")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["control task (by token)"] is None
    assert result["selectivity"] is None
    assert "probed token is the same" in result["undefined"]["control task (by token)"]
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert (tmp_path / "out" / "report.html").read_text().count("<svg") == 1


def test_the_seed_is_the_probes_too(folder, monkeypatch):
    from probing import _beside, beside

    seeds = []
    train = _beside.train_vector_probe

    def watched(*args, seed=0, **how):
        seeds.append(seed)
        return train(*args, seed=seed, **how)

    monkeypatch.setattr(_beside, "train_vector_probe", watched)
    monkeypatch.setattr(beside, "train_vector_probe", watched)
    found = run("linear", *task(folder), "--readout", "resid_in_0", "--epochs", 1, "--seed", 7)
    assert found.exit_code == 0, found.output
    assert seeds == [7, 7, 7]


def test_rows_without_a_value_are_named_or_left_out(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[7]["number"] = None
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [folder, tmp_path / "rows.jsonl", "--label", "number", "--readout", "mlp_update_0", "--epochs", 1]
    found = run("linear", *asked)
    assert found.exit_code == 1
    assert f"{tmp_path / 'rows.jsonl'}, row 8: no value in column 'number'" in found.output
    found = run("linear", *asked, "--missing", "skip", "--json")
    assert found.exit_code == 0, found.output
    assert "left out 1 of 48 rows" in found.stderr
    assert sum(json.loads(found.stdout)["rows"]) == 47


def test_texts_beyond_the_context_are_refused_or_cut(folder, tmp_path):
    rows = [{"text": "the man near the dog" + " ." * (i + 1), "y": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [folder, tmp_path / "rows.jsonl", "--label", "y", "--readout", "mlp_update_0", "--epochs", 1, "--json"]
    found = run("linear", *asked)
    assert found.exit_code == 1
    assert re.search(r"rows\.jsonl, row \d: \d+ tokens, but the model takes 8; .*--cut", found.output)
    assert run("linear", *asked, "--cut").exit_code == 0
    Masks.of(tf.AutoModelForCausalLM.from_pretrained(folder), {"transformer.h.0.mlp": torch.ones(1)}, "module").save(
        tmp_path / "masks"
    )
    asked = [*asked[:4], "--masks", tmp_path / "masks", "--answers", " is are, dog", "--controls", 0, "--cut"]
    found = run("evaluate", *asked)
    assert found.exit_code == 1
    assert re.search(r"row \d: .* and the answer ' is are' need 9 tokens, but the model takes 8", found.output)


class Stop:
    """A progress bar at which Ctrl-C is pressed after so many updates."""

    def __init__(self, monkeypatch, after):
        count = iter(range(10_000))
        update = click._termui_impl.ProgressBar.update

        def stopping(bar, steps, *more):
            update(bar, steps, *more)
            if next(count) == after:
                raise KeyboardInterrupt

        monkeypatch.setattr(click._termui_impl.ProgressBar, "update", stopping)


@pytest.mark.parametrize("command", ["circuit", "subnetwork"])
def test_an_interrupted_run_goes_on_from_its_checkpoint(folder, tmp_path, monkeypatch, command):
    asked = [*task(folder, "plural"), *TRAIN, "--json", "--out"]
    whole = run(command, *asked, tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    with monkeypatch.context() as patched:
        Stop(patched, 12)
        found = run(command, *asked, tmp_path / "parts")
    assert found.exit_code == 1
    assert f"the same command goes on from {tmp_path / 'parts' / 'checkpoint.pt'}" in found.output
    changed = run(command, *asked, tmp_path / "parts", "--lr", 0.01)
    assert changed.exit_code == 1
    assert "another plan" in changed.output
    found = run(command, *asked, tmp_path / "parts")
    assert found.exit_code == 0, found.output
    assert "going on from" in found.stderr
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "masks.json",
        "masks.safetensors",
        "report.html",
        "result.json",
    ]
    one, other = (json.loads(each.stdout) | {"seconds": 0} for each in (whole, found))
    assert one == other
    one, other = (Masks.load(tmp_path / name / "masks").logits for name in ("whole", "parts"))
    assert all(torch.equal(one[path], other[path]) for path in one)


def test_an_interrupted_run_without_a_checkpoint_says_so(folder, tmp_path, monkeypatch):
    for more, message in (([], "no checkpoint was written yet"), (["--label", "other"], "keep no checkpoint")):
        with monkeypatch.context() as patched:
            Stop(patched, 0)
            # twenty steps are kept every two: the first update comes before
            found = run("circuit", *task(folder, "plural"), *TRAIN, *more, "--out", tmp_path / "out")
        assert found.exit_code == 1
        assert message in found.output


@pytest.mark.parametrize(
    ("readout", "more", "message"),
    [
        ("resid_in_0", [], "no layer comes before it"),
        ("mlp_update_0", ["--unit", "head"], "heads are the attention's"),
        ("mlp_update_0", ["--unit", "expert"], "type --unit neuron"),
        ("head_output_1", ["--unit", "module"], "--unit neuron, or --unit head"),
    ],
)
def test_what_cannot_be_masked_is_said(folder, tmp_path, readout, more, message):
    asked = [*task(folder), "--readout", readout, "--epochs", 1, "--out", tmp_path / "out", *more]
    found = run("circuit", *asked)
    assert found.exit_code == 1
    assert message in found.output
    assert not (tmp_path / "out").exists()


def test_every_readout_has_something_to_mask(folder, tmp_path):
    for key in ("attn_update_1", "attn_stream_1", "head_output_1", "mlp_stream_1", "resid_in_1", "resid_mid_1"):
        found = run("circuit", *task(folder), *TRAIN[2:], "--readout", key, "--out", tmp_path / key, "--json")
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["readout"] == key
