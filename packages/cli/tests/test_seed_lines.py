"""Every command line of the seeds, verbatim but for the program's name, the model and the dataset."""

from __future__ import annotations

import io
import json
import shlex

import click
import pytest

from trace_cli._refused import REASONS, REASONS_OF
from trace_cli.main import cli

MODEL, DATA = "EleutherAI/pythia-14m", "NeelNanda/pile-10k"
MAKES = f"build runs/my-index --model {MODEL} --dataset {DATA} --truncation"  # what other lines read
# < > as the seeds have them.
LINES = [
    f"build runs/quickstart --model {MODEL} --dataset {DATA} --truncation --token_batch_size 4096",
    "build <output_path> --model <model_name> --dataset <dataset_name>",
    "<output_path> --model <model_name> --dataset <dataset_name>",
    MAKES,
    "query --index runs/my-index",
    "query --index <index_path> --model <model_name> --unit_norm",
    "reduce <output_path> --model <model_name> --dataset <dataset_name> --method mean --unit_normalize",
    f"reduce runs/my-index --model {MODEL} --dataset {DATA} --truncation --aggregation mean --unit_normalize "
    "--projection_dim 0 --skip_preconditioners",
    "score <output_path> --model <model_name> --dataset <dataset_name> --query_path <existing_index_path> --score mean",
    f"score runs/my-scores --model {MODEL} --dataset {DATA} --truncation --query_path runs/my-index "
    "--projection_dim 16",
    f"hessian runs/my-hessian --model {MODEL} --dataset {DATA} --truncation --method kfac",
    f"preconditioners runs/my-processor --model {MODEL} --dataset {DATA} --truncation --normalizer adam",
    f"trackstar runs/my-trackstar --model {MODEL} --data.dataset {DATA} --data.truncation --query.dataset {DATA} "
    "--query.truncation --projection_dim 16",
    "build <output_path> --model <model_name> --dataset <dataset_name> --reward_column <reward_column_name>",
]


@pytest.fixture
def rows(tmp_path, texts):
    """Short enough for the model's context without truncation, which some lines leave away."""
    path = tmp_path / "rows.jsonl"
    prompts = [text[:20] for text in texts if len(text) > 5]
    lines = ({"text": text, "prompt": text[:3], "reward": n % 3} for n, text in enumerate(prompts))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("line", LINES)
def test_the_line_runs(line, trace, models, rows, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("the old sea\n"))
    stand_ins = {
        MODEL: models["neox"],
        DATA: rows,
        "<output_path>": "runs/out",
        "<model_name>": models["neox"],
        "<dataset_name>": rows,
        "<index_path>": index,
        "<existing_index_path>": index,
        "<reward_column_name>": "reward",
    }
    before = [MAKES] if "runs/my-index" in line and not line.startswith(("build", "reduce")) else []
    for each in (*before, line):
        done = trace(*[stand_ins.get(word, word) for word in shlex.split(each)])
        assert done.code == 0, done.err
        assert done.out


# The fields of the seeds' IndexConfig, which all these commands take, and what their examples add.
INDEX_FLAGS = (
    "model precision revision distributed fsdp peft_init_kwargs model_kwargs tokenizer drop_columns max_tokens "
    "overwrite use_tf32_matmuls debug projection_dim include_bias reshape_to_square projection_type token_batch_size "
    "auto_batch_size processor_path optimizer_state_path skip_preconditioners skip_index stats_sample_size loss_fn "
    "loss_reduction label_smoothing stream_shard_size split_attention_modules attention profile filter_modules "
    "force_math_sdp attribute_tokens modules"
)
FLAGS = {
    "build": f"{INDEX_FLAGS} unit_normalize aggregation dataset truncation reward_column prompt_column "
    "completion_column",
    "reduce": f"{INDEX_FLAGS} unit_normalize aggregation method dataset truncation",
    "score": f"{INDEX_FLAGS} unit_normalize aggregation query_path score dataset truncation",
    "hessian": f"{INDEX_FLAGS} method dataset truncation",
    "preconditioners": f"{INDEX_FLAGS} normalizer dataset truncation",
    "trackstar": f"{INDEX_FLAGS} data.dataset data.truncation query.dataset query.truncation",
    "query": "index model text_field unit_norm device_map_auto faiss top_k record",
}
SEEDS = [(command, flag.replace("_", "-")) for command, flags in FLAGS.items() for flag in flags.split()]
OURS = [("method", name) for name in REASONS]  # a command that the seeds do not have


def options_of(name: str) -> dict[str, click.Parameter]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {option: parameter for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize(("command", "flag"), SEEDS)
def test_every_flag_of_the_seeds_is_there_or_says_why_not(command, flag):
    assert f"--{flag}" in options_of(command)


@pytest.mark.parametrize(
    ("command", "flag"),
    sorted({each for each in [*SEEDS, *OURS] if each[1] in {**REASONS, **REASONS_OF.get(each[0], {})}}),
)
def test_a_flag_that_would_do_nothing_says_why(command, flag, trace, tmp_path):
    if not options_of(command)[f"--{flag}"].hidden:
        return  # the command's own
    done = trace(command, *([] if command == "query" else [tmp_path / "x"]), f"--{flag}")
    assert done.code == 2
    reason = {**REASONS, **REASONS_OF.get(command, {})}[flag]
    assert f"--{flag} would do nothing: {reason}" in " ".join(done.err.split())
    assert not (tmp_path / "x").exists()


def test_every_reason_is_of_a_flag_that_the_command_lacks():
    for command, reasons in REASONS_OF.items():
        options = options_of(command)
        assert all(options[f"--{flag}"].hidden for flag in reasons), command
