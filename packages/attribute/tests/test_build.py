"""Building, continuing and replacing runs: the same bytes in the end, and nothing lost that is not a run's."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from attribute import DataConfig, DataError, IndexConfig, ModelError, RunError, build_index, collect_gradients
from attribute.engine import run_pass
from gradstore import FormatVersion, GradientStore, StoreCorrupt, verify


@pytest.fixture
def dataset(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def config(folders: dict[str, Path], dataset: Path) -> IndexConfig:
    return IndexConfig(
        model=str(folders["gpt2"]), projection_dim=4, rows_per_shard=4, data=DataConfig(dataset=str(dataset))
    )


def contents(path: Path) -> dict[str, bytes]:
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


class Stopped(Exception):
    """The interruption of these tests."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after_shards: int) -> Callable[[], None]:
    """Let the next build fail after so many shards; the returned function undoes it."""
    from attribute import index

    def stopping(model: Any, tokens: Any, plan: Any, windows: Any, sinks: Any, **options: Any) -> None:
        def some():
            for number, window in enumerate(windows):
                if number == after_shards:
                    raise Stopped
                yield window

        run_pass(model, tokens, plan, some(), sinks, **options)

    monkeypatch.setattr(index, "run_pass", stopping)
    return lambda: monkeypatch.setattr(index, "run_pass", run_pass)


@pytest.fixture
def begun(config: IndexConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run stopped after three of its ten shards."""
    resume = interrupt(monkeypatch, 3)
    with pytest.raises(Stopped):
        build_index(tmp_path / "begun", config)
    resume()
    return tmp_path / "begun"


class Notes:
    """Remembers what a build says."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[tuple[str, int | None, int]] = []

    def note(self, message: str) -> None:
        self.said.append(message)

    def start(self, label: str, total: int | None, unit: str) -> None:
        self.stages.append((label, total, 0))

    def advance(self, amount: int) -> None:
        label, total, done = self.stages[-1]
        self.stages[-1] = (label, total, done + amount)

    def stop(self) -> None:
        pass


def test_a_build_gives_a_sound_store_in_the_order_of_the_dataset(config, documents, tmp_path):
    store = build_index(tmp_path / "runs" / "deep" / "run", config)
    assert [store.data(row)["text"] for row in range(store.rows)] == documents
    assert verify(store.path).ok
    assert sorted(each.name for each in store.path.parent.iterdir()) == ["run"]  # no tokens left beside it


def test_a_stream_gives_the_rows_of_the_file(config, tmp_path):
    from datasets import IterableDataset

    stores = [
        build_index(tmp_path / str(streaming), replace(config, data=replace(config.data, streaming=streaming)))
        for streaming in (False, True)
    ]
    stream = IterableDataset.from_generator(lambda: ({"text": stores[0].data(row)["text"]} for row in range(40)))
    from attribute.model import load_model, load_tokenizer

    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    stores.append(collect_gradients(model, stream, tmp_path / "own", tokenizer=tokenizer, config=config))
    shards = [
        {n: b for n, b in contents(Path(each.path)).items() if n.startswith(("shards", "data"))} for each in stores
    ]
    assert shards[0] == shards[1] == shards[2]


def test_progress_counts_every_row_and_token(config, tmp_path):
    notes = Notes()
    store = build_index(tmp_path / "run", config, progress=notes)
    tokens = int(store.side("tokens").sum()) + store.rows  # the first token of a row has no loss
    assert notes.stages == [("tokenise", 40, 40), ("gradients", tokens, tokens)]
    assert notes.said[0].startswith("8 modules, 128 floats a row; they hold 51%")
    assert "output embedding" not in " ".join(notes.said)  # tied


def test_an_interrupted_build_is_continued_to_the_same_bytes(config, begun, tmp_path):
    build_index(tmp_path / "whole", config)
    partial = GradientStore.open(begun, partial=True)
    assert (partial.complete, len(partial.shards)) == (False, 3)
    kept = {shard: (begun / "shards" / f"{shard:05d}.safetensors").stat().st_ino for shard in range(3)}
    notes = Notes()
    build_index(begun, config, progress=notes)
    assert contents(begun) == contents(tmp_path / "whole")
    assert any("are done already" in said for said in notes.said)
    for shard, inode in kept.items():  # not written again
        assert (begun / "shards" / f"{shard:05d}.safetensors").stat().st_ino == inode


@pytest.mark.parametrize("left", [[], ["writer.lock"], ["writer.lock", "shards", "data", "journal.jsonl"]])
def test_what_a_build_killed_before_its_manifest_leaves_is_built_upon(left, config, tmp_path):
    build_index(tmp_path / "whole", config)
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch() if "." in name else (tmp_path / "run" / name).mkdir()
    build_index(tmp_path / "run", config)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_tokens_that_a_killed_build_left_are_taken_over(config, begun, tmp_path):
    scratch = tmp_path / "begun.tokens"
    scratch.mkdir()
    for name in ("ids.bin", "lock"):
        (scratch / name).write_bytes(b"torn")
    build_index(begun, config)
    assert not scratch.exists()


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"projection_dim": 8}, "--projection-dim 4, not 8"),
    ({"projection_type": "normal"}, "--projection-type 'rademacher', not 'normal'"),
    ({"projection_seed": 1}, "--projection-seed 0, not 1"),
    ({"loss_reduction": "mean"}, "--loss-reduction 'sum', not 'mean'"),
    ({"store_dtype": "fp16"}, "--store-dtype 'fp32', not 'fp16'"),
    ({"rows_per_shard": 5}, "--rows-per-shard 4, not 5"),
    ({"token_batch_size": 64}, "--token-batch-size 2048, not 64"),
    ({"modules": ("h.0.*",)}, r"--modules \[\], not \['h.0.\*'\]"),
    ({"precision": "bf16"}, "--precision 'fp32', not 'bf16'"),
]


@pytest.mark.parametrize(("change", "message"), OPTIONS)
def test_another_option_on_resuming_is_refused_by_name(change, message, config, begun):
    before = contents(begun)
    with pytest.raises(RunError, match=f"was begun with {message}: continue it with the same, or .*--overwrite"):
        build_index(begun, replace(config, **change))
    assert contents(begun) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_length": 8}, "--chunk-length 0, not 8"),
        ({"max_tokens": 50}, "--max-tokens 0, not 50"),
        ({"truncation": True}, "--truncation False, not True"),
    ],
)
def test_another_way_of_cutting_on_resuming_is_refused_by_name(change, message, config, begun):
    with pytest.raises(RunError, match=message):
        build_index(begun, replace(config, data=replace(config.data, **change)))


def test_a_changed_dataset_on_resuming_is_refused(config, begun, dataset):
    lines = dataset.read_text().splitlines(keepends=True)
    dataset.write_text("".join([*lines[:20], json.dumps({"text": "another text"}) + "\n", *lines[21:]]))
    with pytest.raises(RunError, match="begun with other tokens: continue it with the same dataset and tokenizer"):
        build_index(begun, config)


def test_another_dataset_on_resuming_is_refused_with_its_old_name(config, begun, dataset, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "the sea"}\n')
    data = replace(config.data, dataset=str(tmp_path / "other.jsonl"))
    with pytest.raises(RunError, match=r"begun with other tokens \(--dataset was '.*data.jsonl'\)"):
        build_index(begun, replace(config, data=data))


def test_other_weights_on_resuming_are_refused_with_their_old_name(config, begun, folders):
    with pytest.raises(RunError, match=r"begun with other weights \(--model was '.*gpt2'\)"):
        build_index(begun, replace(config, model=str(folders["gpt2-other"])))


def test_a_model_and_a_dataset_may_move_while_a_run_rests(config, begun, dataset, folders, tmp_path):
    build_index(tmp_path / "whole", config)
    dataset.rename(tmp_path / "moved.jsonl")
    shutil.copytree(folders["gpt2"], tmp_path / "moved")
    data = replace(config.data, dataset=str(tmp_path / "moved.jsonl"))
    build_index(begun, replace(config, model=str(tmp_path / "moved"), data=data))
    assert contents(begun) == contents(tmp_path / "whole")


def test_a_finished_run_is_refused_before_anything_is_loaded(config, tmp_path):
    build_index(tmp_path / "run", config)
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="holds a finished run already: --overwrite replaces it"):
        build_index(tmp_path / "run", replace(config, model="no-such-model"))
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_replaces_a_run(finished, config, begun, tmp_path):
    other = replace(config, projection_dim=3)
    build_index(tmp_path / "whole", other)
    if finished:
        build_index(begun, config)
    (begun / "config.yaml").write_text("saved by the command line")
    build_index(begun, other, overwrite=True)
    assert contents(begun) == contents(tmp_path / "whole")


def test_overwrite_of_nothing_is_a_build(config, tmp_path):
    build_index(tmp_path / "a", config)
    build_index(tmp_path / "b", config, overwrite=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "shards.old"])
def test_a_folder_that_is_no_run_is_never_touched(name, overwrite, config, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "photo.jpg").write_bytes(b"mine")
    (tmp_path / "run" / name).write_text('{"name": "a web page", "start_url": "/"}')
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=f"is not empty and holds no run \\({name} is in it\\)"):
        build_index(tmp_path / "run", config, overwrite=overwrite)
    assert contents(tmp_path / "run") == before


def test_overwrite_never_deletes_what_somebody_put_into_a_run(config, tmp_path):
    build_index(tmp_path / "run", config)
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=r"also holds thesis\.tex, which no build put there"):
        build_index(tmp_path / "run", config, overwrite=True)
    assert contents(tmp_path / "run") == before


def test_a_folder_named_like_the_tokens_is_never_touched(config, tmp_path):
    (tmp_path / "run.tokens").mkdir()
    (tmp_path / "run.tokens" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match=r"run\.tokens, where a build of .* holds mine\.txt"):
        build_index(tmp_path / "run", config)
    assert (tmp_path / "run.tokens" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "run").exists()


def test_two_builds_of_one_run_at_a_time_are_refused(config, begun, tmp_path):
    scratch = tmp_path / "begun.tokens"
    scratch.mkdir()
    with (scratch / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process is building"):
            build_index(begun, config)
        assert scratch.exists()
    build_index(begun, config)


def test_a_run_that_is_a_file_is_refused(config, dataset):
    with pytest.raises(RunError, match="is a file, not a run folder"):
        build_index(dataset, config)


def test_failed_overwrite_keeps_the_old_run_until_the_new_data_is_read(config, tmp_path):
    build_index(tmp_path / "run", config)
    before = contents(tmp_path / "run")
    for broken in ({"dataset": str(tmp_path / "nothing.jsonl")}, {"prompt_column": "txt"}):
        with pytest.raises(DataError):
            build_index(tmp_path / "run", replace(config, data=replace(config.data, **broken)), overwrite=True)
        assert contents(tmp_path / "run") == before


def test_a_run_of_a_future_format_is_refused(config, begun):
    manifest = begun / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 999'))
    with pytest.raises(FormatVersion, match="999"):
        build_index(begun, config)


def test_a_damaged_manifest_is_refused(config, begun):
    manifest = begun / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 40', '"rows": 41'))
    with pytest.raises(StoreCorrupt):
        build_index(begun, config)


def bad_inputs(path: Path) -> dict[str, tuple[list[dict[str, Any]], type[Exception], str]]:
    return {
        "column": ([{"txt": "a sea"}], DataError, "has no column 'text'"),
        "short": ([{"text": ""}, {"text": "s"}], DataError, "none of the 2 rows of .* has a token with a loss"),
        "vocabulary": ([{"input_ids": [1, 2, 300]}], DataError, "row 0 has token id 300, the model knows 300"),
        "kind": ([{"text": "fine"}, {"text": 3}], DataError, "cannot be read|expected text, found int"),
        "long": ([{"text": "s" * 49}], DataError, "row 0 has 49 tokens, the model takes 48"),
    }


@pytest.mark.parametrize("case", ["column", "short", "vocabulary", "kind", "long"])
def test_bad_data_leaves_nothing_behind(case, config, tmp_path):
    records, error, message = bad_inputs(tmp_path)[case]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = set(os.listdir(tmp_path))
    with pytest.raises(error, match=message):
        build_index(tmp_path / "new" / "runs" / "run", replace(config, data=DataConfig(dataset=str(path))))
    assert set(os.listdir(tmp_path)) == before


def test_a_bad_model_leaves_nothing_behind(config, tmp_path):
    before = set(os.listdir(tmp_path))
    with pytest.raises(ModelError, match="no model folder"):
        build_index(tmp_path / "new" / "run", replace(config, model=str(tmp_path / "nothing")))
    assert set(os.listdir(tmp_path)) == before


def test_rows_without_loss_are_kept_as_zeros_and_counted(make_model, tokenizer, tmp_path):
    records = [{"text": "the sea"}, {"text": ""}, {"text": "s"}, {"text": "a hill"}]
    notes = Notes()
    store = collect_gradients(make_model("gpt2"), records, tmp_path / "run", tokenizer=tokenizer, progress=notes)
    assert [bool(store.row(row).any()) for row in range(4)] == [True, False, False, True]
    assert store.side("tokens").tolist()[1:3] == [0, 0]
    assert store.data(1) == {"text": ""}
    assert "2 of 4 rows have no token with a loss: kept, with zero gradient" in notes.said


def test_completions_that_truncation_cut_off_are_counted(make_model, tokenizer, tmp_path):
    records = [{"q": "s" * 60, "a": "sea"}, {"q": "in ", "a": "sea"}]
    data = DataConfig(prompt_column="q", completion_column="a", truncation=True)
    notes = Notes()
    store = collect_gradients(
        make_model("gpt2"),
        records,
        tmp_path / "run",
        tokenizer=tokenizer,
        config=IndexConfig(data=data),
        progress=notes,
    )
    assert not store.row(0).any()
    assert "1 of 2 rows have no token with a loss: kept, with zero gradient" in notes.said


def test_a_dataset_of_the_datasets_library_is_taken_as_it_is(make_model, tokenizer, documents, tmp_path):
    import datasets

    dataset = datasets.Dataset.from_dict({"text": documents[:9], "id": list(range(9))})
    store = collect_gradients(make_model("llama"), dataset, tmp_path / "run", tokenizer=tokenizer)
    assert [store.data(row) for row in range(9)] == list(dataset)


def test_texts_without_a_tokenizer_are_refused(make_model, tmp_path):
    with pytest.raises(DataError, match="needs a tokenizer"):
        collect_gradients(make_model("gpt2"), [{"text": "a"}], tmp_path / "run")


def test_what_is_not_captured_is_said(make_model, tokenizer, tmp_path):
    notes = Notes()
    records = [{"text": "the sea"}]
    collect_gradients(make_model("gpt_neox"), records, tmp_path / "run", tokenizer=tokenizer, progress=notes)
    assert any(said.startswith("not captured: ") and "output embedding 4,800" in said for said in notes.said)


def test_rows_of_tokens_sum_to_the_row_of_their_document(config, tmp_path):
    """Shards cut through documents; a document without a loss has rows of zeros."""
    import numpy as np

    whole = build_index(tmp_path / "rows", config)
    tokens = build_index(tmp_path / "tokens", replace(config, attribute_tokens=True, rows_per_shard=17))
    rows, offsets = tokens.block(0, tokens.rows), tokens.offsets
    sums = np.stack([rows[start:stop].sum(0) for start, stop in pairwise(offsets)])
    expected = whole.block(0, whole.rows)
    assert np.linalg.norm(sums - expected) <= 1e-4 * np.linalg.norm(expected)
    assert not rows[offsets[1:] - 1].any()  # the last token of a document predicts nothing
    assert tokens.data(int(offsets[3]))["text"] == whole.data(3)["text"]


def test_a_stopped_build_of_tokens_goes_on(config, tmp_path, monkeypatch):
    config = replace(config, attribute_tokens=True, rows_per_shard=17)
    build_index(tmp_path / "whole", config)
    undo = interrupt(monkeypatch, 2)
    with pytest.raises(Stopped):
        build_index(tmp_path / "run", config)
    undo()
    build_index(tmp_path / "run", config)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_hit_in_an_index_of_tokens_says_where_it_stands(config, tmp_path):
    from attribute import Asker, QueryConfig
    from attribute.query import answer

    store = build_index(tmp_path / "run", replace(config, attribute_tokens=True, projection_dim=8))
    text = store.data(int(store.offsets[3]))["text"]
    found = Asker.open(tmp_path / "run").ask([{"text": text}], QueryConfig(top_k=3))
    hit = found.proponents(0)[0]
    assert store.document(hit.row) == (hit.document, hit.position)
    assert hit.record == store.item(hit.document)
    listed = answer(found, [{"text": text}])["queries"][0]["proponents"][0]
    assert (listed["document"], listed["position"]) == (hit.document, hit.position)
