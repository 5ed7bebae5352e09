"""Whatever is wrong with the input: one clear line, exit code 1, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write(tmp_path: Path):
    def write(*records: dict[str, Any]) -> Path:
        path = tmp_path / "bad.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def assert_refused(result: Any, *messages: str) -> None:
    assert (result.code, result.out) == (1, "")
    for message in messages:
        assert message in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.err
    assert "not foreseen" not in result.err


@pytest.fixture
def refused(trace, tmp_path):
    """Build into a new folder, see it refused, and see that the folder was not made."""

    def refused(*options: object, messages: tuple[str, ...]) -> None:
        before = sorted(os.listdir(tmp_path))
        assert_refused(trace("build", tmp_path / "new" / "run", *options), *messages)
        assert sorted(os.listdir(tmp_path)) == before

    return refused


def test_a_missing_model_folder(refused, dataset, tmp_path):
    refused("--model", tmp_path / "nothing", "--dataset", dataset, messages=("there is no model folder",))
    (tmp_path / "empty").mkdir()
    refused("--model", tmp_path / "empty", "--dataset", dataset, messages=("holds no config.json",))


def test_a_model_that_the_hub_does_not_give(refused, dataset):
    refused("--model", "no-such-model", "--dataset", dataset, messages=("'no-such-model' cannot be loaded",))


def test_a_missing_dataset(refused, models, tmp_path):
    refused(
        "--model", models["neox"], "--dataset", tmp_path / "nothing.jsonl", messages=("there is no file or folder",)
    )


def test_a_dataset_without_the_column(refused, models, write):
    path = write({"txt": "a sea"})
    refused("--model", models["neox"], "--dataset", path, messages=("has no column 'text'", "did you mean txt?"))


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_dataset(content, refused, models, tmp_path):
    (tmp_path / "bad.txt").write_text(content)
    refused("--model", models["neox"], "--dataset", tmp_path / "bad.txt", messages=("has no rows",))


def test_documents_of_no_or_one_token_are_kept_as_zero_rows(trace, models, write, tmp_path):
    path = write({"text": "the sea"}, {"text": ""}, {"text": "s"}, {"text": "a hill"})
    result = trace("build", tmp_path / "run", "--model", models["neox"], "--dataset", path)
    assert result.code == 0
    assert "2 of 4 rows have no token with a loss: kept, with zero gradient" in result.err
    found = trace("query", "--index", tmp_path / "run", "--text", "the sea", "--json", "--top-k", 4).json["queries"][0]
    scores = {hit["row"]: hit["score"] for hit in found["proponents"]}
    assert (scores[1], scores[2]) == (0, 0)


def test_nothing_but_documents_of_no_or_one_token(refused, models, write):
    path = write({"text": ""}, {"text": "s"})
    refused("--model", models["neox"], "--dataset", path, messages=("none of the 2 rows", "fewer than 2 tokens"))


def test_a_document_longer_than_the_context(refused, models, write):
    path = write({"text": "s" * 33})
    messages = ("row 0 has 33 tokens, the model takes 32", "--truncation", "--chunk-length 32")
    refused("--model", models["neox"], "--dataset", path, messages=messages)


def test_a_token_outside_the_vocabulary(refused, models, write):
    path = write({"input_ids": [1, 2, 3]}, {"input_ids": [1, 258]})
    refused("--model", models["neox"], "--dataset", path, messages=("row 1 has token id 258, the model knows 258",))


def test_weights_that_are_nan(refused, models, dataset, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(models["neox"], tmp_path / "nan"))
    weights = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    weights[name][2, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("--model", folder, "--dataset", dataset, messages=(f"the weight {name} holds NaN or infinity",))


def test_a_pattern_that_matches_nothing(refused, build_options):
    refused(*build_options, "--modules", "layers.*.mpl.*", messages=("matches no module", "did you mean: layers.1.mlp"))


def test_options_out_of_range(refused, build_options):
    for option, value in (
        ("--projection-dim", -1),
        ("--token-batch-size", 0),
        ("--max-tokens", -3),
        ("--chunk-length", 1),
    ):
        refused(*build_options, option, value, messages=(option,))


def test_options_that_contradict(refused, build_options):
    refused(*build_options, "--chunk-length", 8, messages=("--truncation throws away what --chunk-length would keep",))


def test_a_finished_run_with_and_without_overwrite(trace, build_options, copy_of_index, contents):
    before = contents(copy_of_index)
    again = trace("build", copy_of_index, *build_options)
    assert_refused(again, "holds a finished run already: --overwrite replaces it")
    assert contents(copy_of_index) == before
    assert trace("build", copy_of_index, *build_options, "--projection-seed", 1, "--overwrite").code == 0
    assert contents(copy_of_index) != before
    assert trace("build", copy_of_index, *build_options, "--overwrite").code == 0
    assert contents(copy_of_index) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_that_is_no_run(overwrite, trace, build_options, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    assert_refused(trace("build", tmp_path / "thesis", *build_options, *overwrite), "is not empty and holds no run")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "mine"


def test_a_query_of_another_model(trace, index, models):
    for other, message in (("other", "made from other weights"), ("llama", "made from another model")):
        assert_refused(trace("query", "--index", index, "--model", models[other], "--text", "the sea"), message)


def test_a_query_whose_model_has_gone(trace, models, dataset, tmp_path):
    folder = Path(shutil.copytree(models["neox"], tmp_path / "model"))
    assert trace("build", tmp_path / "run", "--model", folder, "--dataset", dataset, "--truncation").code == 0
    shutil.rmtree(folder)
    assert_refused(trace("query", "--index", tmp_path / "run", "--text", "the sea"), "no model folder", "--model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", '{"question": "why?"}\n', "queries need text as the index has, or prompt and completion, or text"),
        ("q.jsonl", "", "has no rows"),
        ("q.jsonl", "{", "cannot be read"),
        ("q.jsonl", '{"text": "s"}\n', "query 0 has 1 tokens, none with a loss"),
    ],
)
def test_broken_queries(name, content, message, trace, index, tmp_path):
    (tmp_path / name).write_text(content)
    assert_refused(trace("query", "--index", index, "--queries", tmp_path / name), message)


def test_query_options(trace, index):
    assert_refused(trace("query", "--index", index, "--text", "the sea", "--top-k", 0), "--top-k must be at least 1")
    both = trace("query", "--index", index, "--text", "the sea", "--queries", index / "manifest.json")
    assert (both.code, "exclude each other" in both.err) == (2, True)


@pytest.fixture
def future(copy_of_index: Path) -> Path:
    manifest = copy_of_index / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99'))
    return copy_of_index


def test_a_manifest_of_a_future_version(future, trace, build_options):
    commands: tuple[tuple[object, ...], ...] = (
        ("query", "--index", future, "--text", "the sea"),
        ("store", "info", future),
        ("store", "verify", future),
        ("build", future, *build_options),
    )
    for command in commands:
        assert_refused(trace(*command), "99", "version 1")


def test_a_folder_without_a_store(trace, tmp_path):
    for command in (
        ("query", "--index", tmp_path, "--text", "x"),
        ("store", "info", tmp_path),
        ("store", "verify", tmp_path),
    ):
        result = trace(*command)
        assert (result.code, "Traceback" in result.err) == (1, False)


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_too_full_for_the_tokens_leaves_nothing_behind(trace, build_options, tmp_path):
    with full_disk(after=100):
        result = trace("build", tmp_path / "new" / "run", *build_options)
    assert_refused(result, "the tokens cannot be written (File too large)")
    assert os.listdir(tmp_path) == []


def test_a_disk_too_full_for_a_shard_keeps_what_is_finished_and_goes_on(
    trace, build_options, index, contents, tmp_path
):
    options = [*build_options, "--rows-per-shard", "3"]
    assert trace("build", tmp_path / "whole", *options).code == 0
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    with full_disk(after=largest - 1):
        result = trace("build", tmp_path / "run", *options)
    assert_refused(result, "can't be written (File too large)", "resume")
    assert sorted(os.listdir(tmp_path)) == ["run", "whole"]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    unfinished = trace("query", "--index", tmp_path / "run", "--text", "the sea")
    assert_refused(unfinished, "unfinished")
    assert trace("build", tmp_path / "run", *options).code == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_written(trace, build_options, tmp_path):
    (tmp_path / "file").write_text("")
    result = trace("build", tmp_path / "file" / "run", *build_options)
    assert result.code == 1
    assert "Not a directory" in result.err
