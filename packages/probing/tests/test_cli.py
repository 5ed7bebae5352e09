"""`trace probe`: every command on a local model folder, and messages instead of tracebacks."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from zoo import save_worded_gpt2

import probing
from probing import Masks
from probing.cli import probe

WORDS = ["[PAD]", "[UNK]", "the", "man", "men", "dog", "dogs", "cat", "cats", "near", "is", "are", "old", "red", "The"]
NOUNS = {"man": "singular", "men": "plural", "dog": "singular", "dogs": "plural", "cat": "singular", "cats": "plural"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    save_worded_gpt2(where, WORDS, 16)
    rows = []
    for number, noun in enumerate(list(NOUNS) * 12):
        adjective = ("old", "red")[number % 2]
        other = list(NOUNS)[(number * 5 + 1) % 6]
        rows.append({"text": f"the {adjective} {noun} near the {other}", "noun": noun, "number": NOUNS[noun]})
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


def run(*arguments):
    return CliRunner().invoke(probe, [str(a) for a in arguments])


def task_arguments(folder):
    return [folder, folder / "rows.jsonl", "--label", "number", "--position", "word:noun"]


def test_importing_the_command_does_not_import_torch():
    code = "import sys, probing.cli; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_exactly_these():
    assert sorted(dir(probing)) == sorted(probing.__all__)
    assert all(getattr(probing, name) is not None for name in probing.__all__)
    with pytest.raises(AttributeError, match="Circuits"):
        _ = probing.Circuits


def test_a_circuit_is_found_kept_and_evaluated(folder, tmp_path):
    out = tmp_path / "run"
    options = [
        "--readout",
        "mlp_update_0",
        "--epochs",
        5,
        "--batch-size",
        16,
        "--lr",
        0.05,
        "--l0-lambda",
        0,
        "--out",
        out,
    ]
    found = run("circuit", *task_arguments(folder), *options, "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["classes"] == ["plural", "singular"]
    assert result["rows"] == [54, 18]
    assert json.loads((out / "result.json").read_text()) == result
    masks = Masks.load(out / "masks")
    assert list(masks.sites) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "<link" not in page
    asked = ["--masks", out / "masks.safetensors", "--answers", " are, is", "--controls", 3, "--pool", "all", "--json"]
    for how in ("zero", "mean", "resample"):
        found = run("evaluate", *task_arguments(folder), *asked, "--how", how)
        assert found.exit_code == 0, found.output
        effect = json.loads(found.stdout)
        assert effect["answers"] == {"plural": " are", "singular": " is"}
        assert effect["rows"] == 18


def test_several_labels_are_trained_together_and_end_as_alone(folder, tmp_path):
    options = ["--readout", "mlp_update_0", "--epochs", 5, "--batch-size", 16, "--lr", 0.05, "--l0-lambda", 1e-6]
    options += ["--position", "word:noun", "--seed", 1]  # a draw with every noun in both parts: none changes sides
    files = [folder, folder / "rows.jsonl"]
    both = ["--label", "number", "--label", "noun"]
    found = run("circuit", *files, *both, *options, "--out", tmp_path / "both", "--json")
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout)
    assert list(results) == ["number", "noun"]
    assert results["noun"]["classes"] == sorted(NOUNS)
    for label in results:
        alone = run("circuit", *files, "--label", label, *options, "--out", tmp_path / label, "--json")
        assert alone.exit_code == 0, alone.output
        together, single = (json.loads((tmp_path / at / "result.json").read_text()) for at in (f"both/{label}", label))
        assert {k: v for k, v in together.items() if k != "seconds"} == {
            k: v for k, v in single.items() if k != "seconds"
        }
        mine, theirs = (Masks.load(tmp_path / at / "masks").keep for at in (f"both/{label}", label))
        assert all(torch.equal(mine[path], theirs[path]) for path in theirs)
        assert f"Circuit probe: {label}" in (tmp_path / "both" / label / "report.html").read_text()
    table = run("circuit", *files, *both, *options, "--out", tmp_path / "table").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["variable", "number", "noun"]


def test_several_readouts_are_swept_in_one_pass(folder, tmp_path):
    readouts = [
        word for layer in (0, 1) for part in ("attn", "mlp") for word in ("--readout", f"{part}_update_{layer}")
    ]
    options = ["--label", "number", "--label", "noun", "--position", "word:noun", "--epochs", 2, "--batch-size", 16]
    found = run("circuit", folder, folder / "rows.jsonl", *readouts, *options, "--out", tmp_path, "--json")
    assert found.exit_code == 0, found.output
    results = json.loads(found.stdout)
    assert list(results) == [f"{label}/{key}" for label in ("number", "noun") for key in readouts[1::2]]
    for name, result in results.items():
        assert json.loads((tmp_path / name / "result.json").read_text()) == result
        layer, part = result["readout"][-1], result["readout"].partition("_")[0]
        assert all(
            path.startswith(f"transformer.h.{layer}.{part}.") for path in Masks.load(tmp_path / name / "masks").sites
        )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--label", "number"], 2, "--label names the same twice"),
        (["--readout", "mlp_update_0"], 2, "--readout names the same twice"),
        (["--label", "noun", "--target-sparsity", 0.5], 2, "one --label and --readout at a time"),
        (["--readout", "attn_update_0", "--loss", "linear"], 2, "one --label and --readout at a time"),
        (["--label", "../noun"], 2, "cannot name a folder"),
        (["--label", ".."], 2, "cannot name a folder"),
        (["--label", "nouns"], 1, "did you mean 'noun'"),
        (["--label", "constant"], 1, "label 'constant': all 72 rows of"),
    ],
)
def test_several_labels_that_cannot_be_together_are_refused(folder, tmp_path, arguments, code, message):
    rows = [json.loads(line) | {"constant": 1} for line in (folder / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--label", "number", "--readout", "mlp_update_0", "--epochs", 1, "--out", tmp_path / "out"]
    found = run("circuit", folder, tmp_path / "rows.jsonl", *options, *arguments)
    assert found.exit_code == code, found.output
    assert message in found.output
    assert not (tmp_path / "out").exists()


def test_a_subnetwork_probe_reports_held_out_accuracy(folder, tmp_path):
    options = ["--readout", "mlp_stream_0", "--epochs", 4, "--batch-size", 16, "--hidden", 8, "--out", tmp_path]
    found = run("subnetwork", *task_arguments(folder), *options, "--target-sparsity", 0.5, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["units kept"] == {"kept": 80, "of": 160}


def test_a_linear_probe_reads_the_word_and_leace_erases_it(folder):
    found = run("linear", *task_arguments(folder), "--readout", "resid_in_0", "--epochs", 30)
    assert found.exit_code == 0, found.output
    lines = dict(line.split("  ", 1) for line in found.stdout.splitlines())
    assert lines["accuracy"].strip().startswith("1.000")
    assert float(lines["linear probe after LEACE"].strip().split()[0]) < 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "numbers"], "did you mean 'number'"),
        (["--position", "word:verb"], "no column 'verb'"),
        (["--position", "9"], "there is no position 9"),
        (["--position", "middle"], "is no rule"),
        (["--readout", "mlp_updat_0"], "names no readout"),
        (["--readout", "mlp_update_7"], "layer 7 does not exist"),
        (["--sites", "transformer.h.0.mlp.c_fx"], "transformer.h.0.mlp.c_fc"),
        (["--label", "constant"], "one class"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_1(folder, tmp_path, arguments, message):
    rows = [json.loads(line) | {"constant": 1} for line in (folder / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--label", "number", "--readout", "mlp_update_0", "--epochs", 1, "--out", tmp_path / "out"]
    found = run("circuit", folder, tmp_path / "rows.jsonl", *options, *arguments)
    assert found.exit_code == 1, found.output
    assert message in found.output
    assert "Traceback" not in found.output


def test_a_missing_model_and_foreign_masks_are_messages_too(folder, tmp_path):
    found = run("linear", tmp_path / "nowhere", folder / "rows.jsonl", "--label", "number", "--readout", "resid_in_0")
    assert found.exit_code == 1
    found = run("evaluate", *task_arguments(folder), "--masks", tmp_path / "none", "--answers", " are, is")
    assert found.exit_code == 1
    assert "no such file" in found.output
    found = run("evaluate", *task_arguments(folder), "--masks", tmp_path / "none", "--answers", " are")
    assert found.exit_code == 2
