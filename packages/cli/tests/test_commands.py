"""build, query and store, as a person types them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from gradstore import GradientStore
from trace_cli.main import cli


def test_build_tells_what_it_made_on_stdout_and_how_on_stderr(trace, build_options, tmp_path):
    result = trace("build", tmp_path / "run", *build_options)
    first, second = result.out.splitlines()
    assert first.startswith(f"30 rows × 128 floats in {tmp_path / 'run'} (")
    assert second == f'ask it:  trace query --index {tmp_path / "run"} --text "…"'
    assert "8 modules, 128 floats a row" in result.err
    assert "gradients: " in result.err
    assert result.code == 0


def test_build_as_json(trace, build_options, tmp_path):
    summary = trace("build", tmp_path / "run", *build_options, "--json").json
    assert summary.pop("seconds") > 0
    assert summary == {"path": str(tmp_path / "run"), "rows": 30, "width": 128, "modules": 8}


def test_snake_case_spellings_are_accepted(trace, models, dataset, index, contents, tmp_path):
    """The command of the field's quickstart, as it stands."""
    options = ["--model", models["neox"], "--dataset", dataset, "--truncation", "--token_batch_size", 2048]
    result = trace("build", tmp_path / "run", *options, "--projection_dim", 4)
    assert result.code == 0
    assert contents(tmp_path / "run") == contents(index)


def test_a_saved_configuration_builds_an_equal_store(trace, index, contents, tmp_path):
    saved = yaml.safe_load((index / "config.yaml").read_text())
    assert saved["command"] == "build"
    assert saved["options"]["token_batch_size"] == 2048  # defaults are saved, too
    saved["options"]["run_path"] = str(tmp_path / "again")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert trace("--config", tmp_path / "config.yaml").code == 0
    assert contents(tmp_path / "again") == contents(index)
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert again == saved


def test_a_saved_configuration_runs_from_the_run_itself(trace, index, contents, tmp_path):
    from shutil import move

    saved = yaml.safe_load((index / "config.yaml").read_text())
    saved["options"] |= {
        "run_path": str(tmp_path / "run"),
        "modules": ["layers.1.attention.*", "layers.1.mlp.*"],
        "rows_per_shard": 7,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert trace("--config", tmp_path / "config.yaml").code == 0
    move(tmp_path / "run", tmp_path / "old")
    assert trace("--config", tmp_path / "old" / "config.yaml").code == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "old")
    assert len(GradientStore.open(tmp_path / "run").columns) == 4


def test_an_interrupted_build_is_continued_by_its_saved_configuration(
    trace, build_options, index, contents, tmp_path, monkeypatch
):
    import attribute.index

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(attribute.index, "run_pass", interrupted)
        assert trace("build", tmp_path / "run", *build_options, "--overwrite").code == 130
    assert not GradientStore.open(tmp_path / "run", partial=True).complete
    assert trace("--config", tmp_path / "run" / "config.yaml").code == 0
    assert contents(tmp_path / "run") == contents(index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no configuration of trace"),
        ("", "is no configuration of trace"),
        ("command: build", "is no configuration of trace"),
        ("{command: fly, options: {}}", "names the command 'fly', which this version does not have"),
        ("{command: build, options: {speed: 3}}", "build has no option speed"),
        ("{command: build, options: {}}", "Missing argument 'RUN_PATH'"),
        ("{command: build, options: {run_path: x, projection_dim: many}}", "'many' is not a valid integer"),
        ("{command: build, options: {run_path: x, precision: fp99}}", "'fp99' is not one of"),
    ],
)
def test_a_broken_configuration_is_refused(text, message, trace, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    result = trace("--config", tmp_path / "config.yaml")
    assert result.code in (1, 2)
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_configuration_beside_a_command_is_wrong_usage(trace, index):
    result = trace("--config", index / "config.yaml", "store", "info", index)
    assert result.code == 2
    assert "--config names the command itself" in result.err


def test_query_as_json_has_the_promised_shape(trace, index, texts):
    found = trace("query", "--index", index, "--text", texts[7], "--text", "no such text", "--top_k", 3, "--json").json
    assert set(found) == {"queries"}
    assert [each["query"] for each in found["queries"]] == [0, 1]
    for each in found["queries"]:
        assert [len(each[side]) for side in ("proponents", "opponents")] == [3, 3]
        for hit in [*each["proponents"], *each["opponents"]]:
            assert hit["text"] == texts[hit["row"]]
            assert isinstance(hit["score"], float)
        scores = [hit["score"] for hit in each["proponents"]]
        assert scores == sorted(scores, reverse=True)
    best = found["queries"][0]["proponents"][0]
    assert best["row"] == 7
    assert best["score"] == pytest.approx(1, abs=1e-5)


def test_queries_of_a_file_are_those_of_the_texts(trace, index, texts, tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[3:6]))
    by_file = trace("query", "--index", index, "--queries", path, "--json").json
    by_text = trace(
        "query", "--index", index, "--json", *(each for text in texts[3:6] for each in ("--text", text))
    ).json
    assert by_file == by_text


def test_prompt_and_completion_queries_differ_from_the_whole_text(trace, index, tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text('{"prompt": "the old ", "completion": "towns"}\n')
    pair = trace("query", "--index", index, "--queries", path, "--json", "--no-unit-norm").json["queries"][0]
    whole = trace("query", "--index", index, "--text", "the old towns", "--json", "--no-unit-norm").json["queries"][0]
    assert pair["text"] == whole["text"] == "the old towns"
    assert pair["proponents"][0]["score"] != pytest.approx(whole["proponents"][0]["score"], rel=1e-3)


def test_a_query_prints_a_table_for_people(trace, index, texts):
    printed = trace("query", "--index", index, "--text", texts[7], "--top-k", 2).out
    for expected in (texts[7], "lower its loss", "raise its loss", "+1.000", "cosine"):
        assert expected in printed
    assert "dot" in trace("query", "--index", index, "--text", texts[7], "--no-unit-norm").out


def test_texts_that_look_like_markup_are_printed_as_they_are(trace, index):
    assert "[bold]the[/nonsense] sea" in trace("query", "--index", index, "--text", "[bold]the[/nonsense] sea").out


def test_questions_come_from_stdin_until_an_empty_line_or_the_end(index, texts):
    for typed in (f"{texts[2]}\n{texts[3]}\n\nnot read\n", f"{texts[2]}\n{texts[3]}"):
        result = CliRunner().invoke(cli, ["query", "--index", str(index), "--json"], input=typed)
        assert result.exit_code == 0, result.output
        asked = [json.loads(line)["queries"][0]["text"] for line in result.stdout.splitlines()]
        assert asked == texts[2:4]


def test_a_question_without_loss_does_not_end_the_conversation(index, texts):
    result = CliRunner().invoke(cli, ["query", "--index", str(index), "--json"], input=f"s\n{texts[2]}\n")
    assert result.exit_code == 0
    assert "query 0 has 1 tokens" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_hits_are_recorded_as_csv(trace, index, texts, tmp_path):
    path = tmp_path / "hits.csv"
    for _ in range(2):
        trace("query", "--index", index, "--text", texts[7], "--top-k", 2, "--record", path)
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [line["direction"] for line in lines] == ["proponent", "proponent", "opponent", "opponent"] * 2
    assert (lines[0]["query"], lines[0]["result"], lines[0]["result_index"]) == (texts[7], texts[7], "7")


def test_a_moved_model_is_named_with_an_option(trace, models, index, texts, tmp_path):
    from shutil import copytree

    copytree(models["neox"], tmp_path / "moved")
    moved = trace("query", "--index", index, "--model", tmp_path / "moved", "--text", texts[7], "--json").json
    assert moved == trace("query", "--index", index, "--text", texts[7], "--json").json


def test_modules_restrict_a_query(trace, index, texts):
    whole = trace("query", "--index", index, "--text", "a b", "--json").json
    part = trace("query", "--index", index, "--text", "a b", "--json", "--modules", "layers.1.mlp*").json
    assert whole != part
    result = trace("query", "--index", index, "--text", "a b", "--modules", "layers.9.*")
    assert result.code == 1
    assert "matches no module" in result.err


def test_store_info_and_verify(trace, index):
    found = trace("store", "info", index, "--json").json
    assert {name: found[name] for name in ("rows", "rows_done", "width", "modules", "dtype", "complete")} == {
        "rows": 30,
        "rows_done": 30,
        "width": 128,
        "modules": 8,
        "dtype": "fp32",
        "complete": True,
    }
    assert "30" in trace("store", "info", index).out
    sound = trace("store", "verify", index)
    assert (sound.code, "30 rows" in sound.out) == (0, True)
    assert trace("store", "verify", index, "--json").json["ok"] is True


def test_a_flipped_byte_is_found_and_the_shard_named(trace, copy_of_index):
    shard = next((copy_of_index / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    verified = trace("store", "verify", copy_of_index)
    assert verified.code == 1
    assert str(shard) in verified.out
    as_json = trace("store", "verify", copy_of_index, "--json")
    assert (as_json.code, as_json.json["ok"]) == (1, False)
    queried = trace("query", "--index", copy_of_index, "--text", "the sea", "--json")
    assert (queried.code, queried.out) == (1, "")
    assert str(shard) in queried.err


def test_the_program_is_installed_and_its_exit_codes_reach_the_shell(index):
    program = Path(sys.executable).parent / "trace"
    for arguments, code in (
        (["store", "info", str(index)], 0),
        (["store", "info", str(index.parent)], 1),
        (["store", "fly"], 2),
    ):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error(index):
    program = Path(sys.executable).parent / "trace"
    done = subprocess.run(
        f'"{program}" store info "{index}" | true', shell=True, capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
