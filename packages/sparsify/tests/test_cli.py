"""The command line: every spelling of the seeds' README, from files alone, with clear words on errors."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sparsify import Sae, SaeConfig, TrainConfig
from sparsify._options import field_docs, parse_assignments
from sparsify.cli import sae


@pytest.fixture
def model(assets):
    return str(assets / "llama-stories260k")


@pytest.fixture
def text(assets, tmp_path):
    stories = (assets / "text" / "tinystories-0.9mb.txt").read_text()[:60_000]
    (tmp_path / "stories.txt").write_text(stories)
    return str(tmp_path / "stories.txt")


def invoke(*words):
    return CliRunner().invoke(sae, ["train", *words])


def succeed(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


SMALL = ["--num_latents", "256", "--k", "8", "--ctx_len", "64", "--batch_size", "4", "--max_examples", "24"]


def test_the_module_trains_in_a_process_of_its_own(model, text, tmp_path):
    words = [model, text, *SMALL, "--layers", "1", "3", "--save_dir", str(tmp_path / "c"), "--run_name", "r"]
    command = [sys.executable, "-m", "sparsify", *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("layers.1: FVU 0.")
    saved = Sae.load_many(str(tmp_path / "c" / "r"), local=True)
    assert list(saved) == ["layers.1", "layers.3"]
    config = json.loads((tmp_path / "c" / "r" / "config.json").read_text())
    assert config["model"] == model
    assert config["ctx_len"] == 64
    assert "hf_token" not in config


RECIPES = {
    "globs": ["--hookpoints", "layers.[012].self_attn", "layers.[012].mlp.act_fn"],
    "dashes": ["--layer-stride", "2", "--expansion-factor", "8", "--num-latents", "0"],
    "accumulate": ["--layers", "2", "--grad_acc_steps", "2", "--micro_acc_steps", "2", "--auxk_alpha", "0.1"],
    "k decay": ["--layers", "2", "--k_decay_steps", "1_0"],
    "groupmax": ["--layers", "2", "--activation", "groupmax"],
    "ce": ["--hookpoints", "layers.[12].mlp", "--loss_fn", "ce"],
    "kl": ["--layers", "2", "--loss_fn", "kl", "--transcode", "--exclude_special"],
    "transcode": ["--hookpoints", "layers.0.mlp", "--transcode", "--skip_connection", "--optimizer", "signum"],
    "seeds": ["--layers", "2", "--init_seeds", "0", "1", "--multi_topk", "True", "--normalize_decoder", "False"],
    "excluded": ["--layers", "2", "--exclude_tokens", "1", "2", "--max_norm_ratio", "10", "--buffer_batches", "2"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_readme(model, text, tmp_path, name):
    words = [model, text, *SMALL, *RECIPES[name], "--save_dir", str(tmp_path / "c"), "--json"]
    result = json.loads(succeed(*words).stdout.splitlines()[-1])
    saved = Sae.load_many(result["folder"], local=True)
    expected = {
        "globs": [f"layers.{i}.{m}" for i in range(3) for m in ("mlp.act_fn", "self_attn")],
        "dashes": ["layers.0", "layers.2", "layers.4"],
        "seeds": ["layers.2/seed0", "layers.2/seed1"],
        "ce": ["layers.1.mlp", "layers.2.mlp"],
    }
    hook = "layers.0.mlp" if name == "transcode" else "layers.2"
    assert list(saved) == expected.get(name, [hook])
    first = next(iter(saved.values()))
    if name == "dashes":
        assert first.num_latents == 8 * 64
    if name == "seeds":
        assert first.cfg.multi_topk
        assert not first.cfg.normalize_decoder
    if name == "excluded":
        assert result["tokens/layers.2"] < 24 * 64


def test_precision_of_the_model_and_of_the_choices(model, text, tmp_path):
    words = [model, text, *SMALL, "--layers", "2", "--save_dir", str(tmp_path / "c"), "--json"]
    fvu = {}
    for precision in ("auto", "fp32", "bf16"):
        told = succeed(*words, "--run_name", precision, "--precision", precision)
        fvu[precision] = json.loads(told.stdout.splitlines()[-1])["fvu/layers.2"]
        assert Sae.load_from_disk(tmp_path / "c" / precision / "layers.2").W_dec.dtype.itemsize == 4
    assert fvu["auto"] == fvu["fp32"] != fvu["bf16"]
    assert abs(fvu["bf16"] - fvu["fp32"]) < 1e-2 * fvu["fp32"]
    both = invoke(*words, "--precision", "bf16", "--load_in_8bit")
    assert (both.exit_code, "both say how the model is held" in both.output) == (1, True)


def test_resume_and_finetune(model, text, tmp_path):
    words = [model, text, *SMALL, "--layers", "2", "--save_dir", str(tmp_path / "c"), "--run_name", "r"]
    succeed(*words)
    before = Sae.load_from_disk(tmp_path / "c" / "r" / "layers.2").W_dec
    succeed(*words, "--resume")
    assert Sae.load_from_disk(tmp_path / "c" / "r" / "layers.2").W_dec.equal(before)
    words[-1] = "tuned"
    succeed(*words, "--finetune", str(tmp_path / "c" / "r"))
    assert (Sae.load_from_disk(tmp_path / "c" / "tuned" / "layers.2").W_dec - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hookpoints", "layers.9"], "matches no module; did you mean: layers.4"),
        (["--k", "300", "--layers", "1"], "k=300 is more than the 256 latents"),
        (["--layers", "1", "--layer_stride", "2"], "give only one"),
        (["--layers", "1", "--resume"], "nothing to resume"),
        (["--layers", "1", "--batch_size", "100"], "fewer than one batch of 100"),
        (["--layers", "1", "--log_to_wandb"], "needs the wandb package"),
        (["--ctx_len", "0"], "ctx_len=0 must be at least 1"),
        (["--max_examples", "-1"], "max_examples=-1 must be at least 1"),
        (["--layers", "1", "--finetune", "no/such/dir"], "neither a folder here nor to be had from the Hub"),
    ],
)
def test_errors_are_one_line_and_status_one(model, text, tmp_path, words, message):
    result = invoke(model, text, *SMALL, *words, "--save_dir", str(tmp_path / "c"), "--run_name", "none")
    assert result.exit_code == 1
    assert message in result.output


def test_models_in_eight_bits(model, text, tmp_path, monkeypatch):
    """Really tried, wherever bitsandbytes is; elsewhere, and where it has no kernels, one line says so."""
    from importlib.util import find_spec

    words = [model, text, *SMALL, "--layers", "1", "--load_in_8bit", "--save_dir", str(tmp_path / "c")]
    if find_spec("bitsandbytes") is not None:
        succeed(*words)
    else:
        result = invoke(*words)
        assert (result.exit_code, "needs the bitsandbytes package" in result.output) == (1, True)
    import transformers

    def no_kernel(*_, **__):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(transformers, "BitsAndBytesConfig", lambda load_in_8bit: {"load_in_8bit": load_in_8bit})
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", no_kernel)
    result = invoke(*words, "--device", "cpu")
    assert result.exit_code == 1
    assert "bitsandbytes does not run on cpu here (no kernel for this device)" in result.output


def test_usage_errors_are_status_two(model, text):
    for words, message in [
        (["--activaton", "topk"], "--activation"),
        (["--loss_fn", "mse"], "'fvu', 'ce', 'kl'"),
        (["--data_args", "streaming"], "name=value"),
    ]:
        result = invoke(model, text, *words)
        assert result.exit_code == 2
        assert message in result.output


def test_missing_models_and_data_are_named(model, tmp_path):
    assert "cannot be loaded" in invoke(str(tmp_path / "none"), "x").output
    (tmp_path / "rows.jsonl").write_text("")
    result = invoke(model, str(tmp_path / "rows.jsonl"))
    assert result.exit_code == 1
    assert "rows.jsonl' (split 'train') cannot be loaded" in result.output
    (tmp_path / "rows.jsonl").write_text('{"body": "hello"}\n')
    (tmp_path / "short.txt").write_text("hello\n")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for data, message in [
        ("rows.jsonl", "has no column 'text', only body: set --text_column"),
        ("short.txt", "too short to fill one row of 512 tokens: lower --ctx_len, or give more text"),
        ("none.bin", "there is no file"),
        ("odd.bin", "has 3 bytes, which is no whole number"),
    ]:
        result = invoke(model, str(tmp_path / data))
        assert (result.exit_code, message in result.output) == (1, True), result.output


def test_memory_maps_and_saved_datasets(model, tmp_path):
    import numpy as np
    from datasets import Dataset

    ids = np.random.default_rng(0).integers(0, 512, (24, 64))
    ids.astype(np.uint16).tofile(tmp_path / "ids.bin")
    Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(tmp_path / "saved")
    for name in ("ids.bin", "saved"):
        words = [model, str(tmp_path / name), *SMALL, "--layers", "0", "--save_dir", str(tmp_path / "c"), "--json"]
        assert json.loads(succeed(*words).stdout.splitlines()[-1])["tokens/layers.0"] == 24 * 64


def test_a_streamed_dataset(model, tmp_path):
    lines = [json.dumps({"text": f"Once upon a time there was a dog number {n}. " * 12}) for n in range(80)]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    words = [model, str(tmp_path / "s.jsonl"), *SMALL, "--layers", "0", "--save_dir", str(tmp_path / "c"), "--json"]
    words += ["--data_args", "streaming=True"]
    assert json.loads(succeed(*words).stdout.splitlines()[-1])["tokens/layers.0"] == 24 * 64
    short = succeed(*[("400" if word == "24" else word) for word in words])
    assert "Warning: the stream ended after" in short.stderr
    endless = [word for word in words if word not in ("--max_examples", "24")]
    refused = invoke(*endless)
    assert (refused.exit_code, "set --max_examples" in refused.output) == (1, True)


def test_cache_train_evaluate_convert_and_push(model, text, tmp_path):
    def ok(*words):
        result = CliRunner().invoke(sae, [str(w) for w in words])
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.stdout

    rows = ["--ctx_len", "64", "--max_examples", "24"]
    said = ok("cache", model, text, tmp_path / "acts", *rows, "--hookpoints", "layers.[12]", "--batch_size", "4")
    assert "6 batches of layers.1, layers.2" in said
    shape = ["--num_latents", "256", "--k", "8", "--save_dir", tmp_path / "c", "--run_name", "r", "--lr", "1e-3"]
    ok("train", "--cache", tmp_path / "acts", "--hookpoints", "layers.2", *shape)
    assert list(Sae.load_many(str(tmp_path / "c" / "r"), local=True)) == ["layers.2"]
    ok("train", "--cache", tmp_path / "acts", *shape, "--exclude_special", "--device", "cpu", "--run_name", "special")
    settled = json.loads((tmp_path / "c" / "special" / "config.json").read_text())
    assert settled["batch_size"] == 4
    assert settled["exclude_tokens"] == [0, 1, 2]
    both = CliRunner().invoke(sae, ["train", model, "--cache", str(tmp_path / "acts")])
    assert (both.exit_code, "MODEL would do nothing" in both.output) == (1, True)
    for words, message in [
        (["--hookpoints", "layers.3"], "matches no module; did you mean"),
        (["--transcode"], "build it again with pairs=True"),
        (["--loss_fn", "kl"], "runs the model"),
        (["--layers", "1"], "choose with hookpoints"),
        (["--batch_size", "8"], "--batch_size would do nothing, since --cache"),
        (["--ctx_len", "64"], "--ctx_len would do nothing"),
        (["--load_in_8bit"], "--load_in_8bit would do nothing"),
        (["--device", "nowhere"], "device='nowhere' cannot be used"),
    ]:
        result = CliRunner().invoke(sae, ["train", "--cache", str(tmp_path / "acts"), *map(str, shape), *words])
        assert result.exit_code == 1
        assert message in result.output

    table = ok("eval", model, text, tmp_path / "c" / "r", *rows, "--batch_size", "8", "--json")
    judged = json.loads(table.splitlines()[-1])
    assert judged["grafted"]["layers.2"]["kl"] < judged["zero"]["layers.2"]["kl"]
    assert json.loads((tmp_path / "c" / "r" / "eval.json").read_text()) == judged

    special = ["eval", model, text, tmp_path / "c" / "special", *rows, "--json"]
    without, every = (CliRunner().invoke(sae, [str(w) for w in (*special, *more)]) for more in ([], ["--all_tokens"]))
    assert "as in training: --exclude_tokens 0 1 2 (--all_tokens judges every token)" in without.stderr
    same = ok(*special, "--exclude_special")
    counts = [json.loads(out.splitlines()[-1])["tokens"] for out in (without.stdout, same, every.stdout)]
    assert counts[0] == counts[1] < counts[2] == 24 * 64
    loud = json.loads(ok(*special, "--exclude_tokens", "2", "--max_norm_ratio", "1.5").splitlines()[-1])
    assert loud["tokens"] < 24 * 64
    for words, message in [
        (["--all_tokens", "--exclude_special"], "give either"),
        (["--max_batches", "0"], "at least 1"),
    ]:
        refused = CliRunner().invoke(sae, [str(w) for w in (*special, *words)])
        assert (refused.exit_code, message in refused.output) == (1, True)

    assert (tmp_path / "c" / "r" / "eval.svg").read_text().lstrip().startswith("<?xml")

    page = tmp_path / "latents.html"
    few = ["--latents", "3", "--latents", "5", "--contexts", "2", "--out", page]
    assert ok("dashboard", model, text, tmp_path / "c" / "r", *rows, *few) == f"{page}\n"
    assert page.read_text().count("<article id=") == 2
    beyond = ["dashboard", model, text, tmp_path / "c" / "r", *rows, "--latents", "256"]
    refused = CliRunner().invoke(sae, [str(w) for w in beyond])
    assert (refused.exit_code, "latents 0 to 255, not 256" in refused.output) == (1, True)

    assert "sparsify → saelens: layers.2" in ok("convert", tmp_path / "c" / "r", tmp_path / "s", "--to", "saelens")
    assert (tmp_path / "s" / "layers.2" / "sae_weights.safetensors").exists()
    assert "saelens → sparsify: layers.2" in ok("convert", tmp_path / "s", tmp_path / "d")
    again, before = (Sae.load_from_disk(tmp_path / where / "layers.2") for where in ("d", "c/r"))
    assert again.W_dec.equal(before.W_dec)
    listed = ok("push", tmp_path / "c" / "r", "me/sae", "--dry-run")
    assert "layers.2/sae.safetensors" in listed
    assert listed.endswith("nothing was uploaded\n")


def test_help_shows_every_field_and_imports_no_torch():
    call = "sae(['train', '--help'], standalone_mode=False)"
    code = f"import sys; from sparsify.cli import sae; {call}; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("False")
    for cls in (SaeConfig, TrainConfig):
        helps = field_docs(cls)
        assert set(helps) == set(cls.__dataclass_fields__), "every field says what it is"
    for name in (*SaeConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__):
        assert name == "sae" or f"--{name}" in shown


def test_data_arguments():
    assert parse_assignments('a=1, b="x",c=en,d=True,e=1e-3') == {"a": 1, "b": "x", "c": "en", "d": True, "e": 1e-3}
    assert parse_assignments("") == {}
