"""Merged stores are the stores that one writer would have made, byte for byte, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

import gradstore._writer
from gradstore import (
    GradientStore,
    InvalidInput,
    PlanMismatch,
    StoreExists,
    StoreIncomplete,
    StoreWriter,
    merge,
    search,
    verify,
)


def part(arrays, start, stop):
    return type(arrays)(*(getattr(arrays, name)[start:stop] for name in ("rows", "loss", "tokens", "sq_norm", "texts")))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int2"])
@pytest.mark.parametrize("cuts", [(0, 100), (0, 60, 100), (0, 37, 41, 41, 100), (0, 30, 60, 90, 100)])
def test_merging_parts_gives_the_whole(tmp_path, arrays, write, folder_bytes, dtype, cuts):
    options = {"dtype": dtype, "columns": {"a": 5, "b": 7}, "rows_per_shard": 30}
    whole = write(tmp_path / "whole", arrays, **options)
    parts = [write(tmp_path / f"part{i}", part(arrays, a, b), **options) for i, (a, b) in enumerate(pairwise(cuts))]
    before = [folder_bytes(p) for p in parts]
    store = merge(parts, tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(whole)
    assert [folder_bytes(p) for p in parts] == before
    assert store.data(99) == arrays.texts[99]
    assert search(store, arrays.rows[42:43], 1, metric="cos").top_rows.tolist() == [[42]]


def test_shards_may_be_cut_anew(tmp_path, arrays, write, folder_bytes):
    one = write(tmp_path / "one", part(arrays, 0, 50), rows_per_shard=7)
    two = write(tmp_path / "two", part(arrays, 50, 100), rows_per_shard=50)
    merge([one, two], tmp_path / "merged", rows_per_shard=33)
    assert folder_bytes(tmp_path / "merged") == folder_bytes(write(tmp_path / "whole", arrays, rows_per_shard=33))


def test_appending_links_the_shards_that_stay(tmp_path, arrays, write):
    old = write(tmp_path / "old", part(arrays, 0, 60), rows_per_shard=30)
    new = write(tmp_path / "new", part(arrays, 60, 100), rows_per_shard=30)
    merge([old, new], tmp_path / "longer")
    for file in ("shards/00001.safetensors", "data/00001.jsonl"):
        assert (tmp_path / "longer" / file).stat().st_ino == (old / file).stat().st_ino


def test_without_hard_links_files_are_copied(tmp_path, arrays, write, monkeypatch, folder_bytes):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(gradstore._writer.os, "link", refuse)
    whole = write(tmp_path / "whole", arrays, rows_per_shard=30)
    merge([whole], tmp_path / "copy")
    assert folder_bytes(tmp_path / "copy") == folder_bytes(whole)
    assert verify(tmp_path / "copy").ok


def test_stores_that_differ_are_refused(tmp_path, arrays, write, plan):
    one = write(tmp_path / "one", arrays)
    for name, options, message in [
        ("dtype", {"dtype": "fp16"}, "dtype is fp16, but .*one has fp32"),
        ("names", {"columns": {"x": 12}}, r"columns is \{'x': 12\}"),
        ("order", {"columns": {"b": 6, "a": 6}}, "columns is"),
    ]:
        other = write(tmp_path / name, arrays, **options)
        first = write(tmp_path / "ab", arrays, columns={"a": 6, "b": 6}) if name == "order" else one
        with pytest.raises(InvalidInput, match=message):
            merge([first, other], tmp_path / "merged")
    with StoreWriter.create(tmp_path / "plan", rows=0, columns={"a": 12}, plan={**plan, "model": "n"}) as writer:
        writer.write_data([])
    with pytest.raises(PlanMismatch, match=r'plan.model is "m" in the store and "n"'):
        merge([one, tmp_path / "plan"], tmp_path / "merged")
    with pytest.raises(InvalidInput, match="one store or more"):
        merge([], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_meta_must_agree_or_be_given(tmp_path, arrays, write):
    one, two = (write(tmp_path / name, part(arrays, 0, 9), meta={"rank": name}) for name in ("one", "two"))
    with pytest.raises(InvalidInput, match="differ in their meta"):
        merge([one, two], tmp_path / "merged")
    assert merge([one, two], tmp_path / "merged", meta={"ranks": 2}).meta == {"ranks": 2}


def test_only_finished_stores_and_new_folders(tmp_path, arrays, write, plan):
    one = write(tmp_path / "one", arrays)
    StoreWriter.create(tmp_path / "begun", rows=5, columns={"a": 12}, plan=plan).close()
    with pytest.raises(StoreIncomplete):
        merge([one, tmp_path / "begun"], tmp_path / "merged")
    with pytest.raises(StoreExists, match="holds another store"):
        merge([one], tmp_path / "begun")
    with pytest.raises(StoreExists, match="holds another store"):
        merge([one], one)


KILLED_MERGE = """
import os, signal, sys
from gradstore import merge
step, count = int(sys.argv[1]), 0
def guard(name):
    real = getattr(os, name)
    def call(*args):
        global count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return None if name == "fsync" else real(*args)
    setattr(os, name, call)
for name in ("fsync", "replace", "write", "link"):
    guard(name)
merge(sys.argv[3:], sys.argv[2])
"""


def test_a_killed_merge_is_continued(tmp_path, arrays, write, folder_bytes):
    parts = [
        write(tmp_path / f"p{i}", part(arrays, a, b), rows_per_shard=30)
        for i, (a, b) in enumerate([(0, 45), (45, 100)])
    ]
    whole = folder_bytes(merge(parts, tmp_path / "whole").path)
    killed = 0
    for step in range(1, 64) if "GRADSTORE_KILLS" in os.environ else (1, 4, 8, 13, 21, 30, 38, 45, 52):
        target = tmp_path / str(step)
        command = [sys.executable, "-c", KILLED_MERGE, str(step), target, *parts]
        killed += subprocess.run(command, check=False).returncode == -signal.SIGKILL
        if not (target / "manifest.json").exists() or not GradientStore.open(target, partial=True).complete:
            merge(parts, target)
        assert folder_bytes(target) == whole
        assert verify(target).ok
    assert killed > 6


@pytest.mark.parametrize("cut", [45, 60])  # the first shards are put together anew, or taken over whole
def test_a_killed_merge_is_not_continued_with_other_rows(tmp_path, arrays, write, make, cut, monkeypatch):
    first, second = (
        write(tmp_path / name, part(arrays, a, b), rows_per_shard=30)
        for name, a, b in (("one", 0, cut), ("two", cut, 100))
    )
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", StoreWriter.close)
        with pytest.raises(StoreIncomplete):
            merge([first, second], tmp_path / "merged")
    other = part(arrays, 0, cut)
    other.rows[33] += 1  # in the second shard; the texts stay
    changed = write(tmp_path / "other", other, rows_per_shard=30)
    with pytest.raises(InvalidInput, match=r"00001\.safetensors: was begun with other rows"):
        merge([changed, second], tmp_path / "merged")
    assert merge([first, second], tmp_path / "merged").complete


def test_ranks_may_write_side_by_side(tmp_path, arrays, plan, write, folder_bytes):
    code = (
        "import sys, json, numpy as np; from gradstore import StoreWriter;"
        "a, b, path, plan = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]);"
        "w = StoreWriter.create(path, rows=b-a, columns={'a': 2}, plan=plan, rows_per_shard=8, side_columns=());"
        "w.write_data({'i': i} for i in range(a, b));"
        "[w.write(s, np.arange(2*(a+x), 2*(a+y)).reshape(-1, 2)) for s, x, y in w.pending]; w.finish()"
    )
    bounds = [(0, 16), (16, 40), (40, 53)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(a), str(b), tmp_path / str(a), json.dumps(plan)])
        for a, b in bounds
    ]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    store = merge([tmp_path / str(a) for a, _ in bounds], tmp_path / "all")
    np.testing.assert_array_equal(store.block(0, 53), np.arange(106).reshape(-1, 2))
    assert [store.data(i)["i"] for i in range(53)] == list(range(53))
    assert os.path.isdir(tmp_path / "all")
