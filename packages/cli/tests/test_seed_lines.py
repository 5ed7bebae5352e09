"""Every command line of the seeds, verbatim but for the program's name, the model and the dataset."""

from __future__ import annotations

import io
import json
import shlex

import pytest

from trace_cli._refused import REASONS

MODEL, DATA = "EleutherAI/pythia-14m", "NeelNanda/pile-10k"
# In this order, since some read what others wrote; < > as the seeds have them.
LINES = [
    f"build runs/quickstart --model {MODEL} --dataset {DATA} --truncation --token_batch_size 4096",
    "build <output_path> --model <model_name> --dataset <dataset_name>",
    "<output_path> --model <model_name> --dataset <dataset_name>",
    f"build runs/my-index --model {MODEL} --dataset {DATA} --truncation",
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
    if "runs/my-index" in line and not line.startswith(("build", "reduce")):
        # Made by the line before it in the seeds; a score's --projection_dim must be its queries'.
        made = ["--projection_dim", 16] if line.startswith("score") else []
        assert trace("build", "runs/my-index", "--model", models["neox"], "--dataset", rows, *made).code == 0
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
    done = trace(*[stand_ins.get(word, word) for word in shlex.split(line)])
    assert done.code == 0, done.err
    assert done.out


@pytest.mark.parametrize("option", sorted(REASONS))
def test_an_option_that_would_do_nothing_says_why(option, trace, models, rows, tmp_path):
    done = trace("build", tmp_path / "x", "--model", models["neox"], "--dataset", rows, f"--{option}")
    assert done.code == 2
    assert REASONS[option] in " ".join(done.err.split())
    assert not (tmp_path / "x").exists()
