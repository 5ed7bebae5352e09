"""Reading: rows, modules, side columns and text come back as they went in; opening is quick and lazy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore import GradientStore, InvalidInput, StoreIncomplete, StoreNotFound, StoreWriter, info, search, verify
from gradstore._encodings import Layout


def test_what_went_in_comes_out(store, arrays, plan):
    assert len(store) == store.rows == 100
    assert store.width == 12
    assert dict(store.columns) == {"a": slice(0, 4), "b": slice(4, 12)}
    assert store.dtype == "fp32"
    assert store.plan == plan
    assert store.meta == {}
    assert store.shards == [(0, 0, 30), (1, 30, 60), (2, 60, 90), (3, 90, 100)]
    np.testing.assert_array_equal(store.block(0, 100), arrays.rows)
    for name in ("loss", "tokens", "sq_norm"):
        np.testing.assert_array_equal(store.side(name), getattr(arrays, name))
    assert [store.data(i) for i in range(100)] == arrays.texts


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (29, 31), (30, 60), (5, 95), (99, 100), (100, 100)])
def test_blocks_cross_shards(store, arrays, start, stop):
    np.testing.assert_array_equal(store.block(start, stop), arrays.rows[start:stop])
    np.testing.assert_array_equal(store.block(start, stop, ["b"]), arrays.rows[start:stop, 4:])
    np.testing.assert_array_equal(store.block(start, stop, ["b", "a"]), np.roll(arrays.rows[start:stop], 8, axis=1))


def test_rows_are_in_any_process_order(store, arrays):
    for i in (99, 0, 31, 30, 59, 0):
        np.testing.assert_array_equal(store.row(i), arrays.rows[i])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_encodings_round_as_the_format_says(tmp_path, make, write, dtype):
    arrays = make(300, 7)
    arrays.rows *= np.logspace(-9, 9, 300, dtype=np.float64)[:, None].astype(np.float32)
    arrays.sq_norm[:] = 0
    store = GradientStore.open(write(tmp_path / "s", arrays, dtype=dtype))
    step = {"fp32": 0, "fp16": 2**-11, "bf16": 2**-8}[dtype]
    error = np.abs(store.block(0, 300) - arrays.rows)
    assert (error <= step * np.abs(arrays.rows)).all()
    assert store.dtype == dtype


def test_every_half_is_decoded_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)[:, None]
    finite = bits[np.isfinite(bits[:, 0])]
    layout = Layout("fp16", {"a": 1})
    np.testing.assert_array_equal(
        layout.decode({"rows": finite, "scale": np.ones(len(finite), np.float32)}), finite.astype(np.float32)
    )
    assert np.signbit(layout.decode({"rows": np.array([[-0.0]], np.float16), "scale": np.ones(1, np.float32)})).all()


def test_zero_rows_and_one_row(tmp_path, make, write):
    for count in (0, 1):
        path = write(tmp_path / str(count), make(count, 3))
        store = GradientStore.open(path)
        assert store.block(0, count).shape == (count, 3)
        assert store.side("loss").shape == (count,)
        assert verify(path).ok
        assert info(path).rows == count


def test_ten_million_rows_of_side_columns(tmp_path, plan):
    rows, per_shard = 10**7, 2**21
    loss = np.arange(per_shard, dtype=np.float32)
    with StoreWriter.create(
        tmp_path / "s", rows=rows, columns={}, plan=plan, data=False, side_columns=("loss",), rows_per_shard=per_shard
    ) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, np.empty((stop - start, 0), np.float32), {"loss": loss[: stop - start] + shard})
    store = GradientStore.open(tmp_path / "s")
    assert (len(store), store.width) == (rows, 0)
    side = store.side("loss")
    np.testing.assert_array_equal(side[[0, per_shard, rows - 1]], [0, 1, (rows - 1) % per_shard + 4])
    found = search(store, np.empty((1, 0), np.float32), 2)
    np.testing.assert_array_equal(found.top_rows, [[0, 1]])
    np.testing.assert_array_equal(found.bottom_scores, [[0, 0]])
    assert verify(tmp_path / "s").ok


def test_text_of_every_kind_survives(tmp_path, plan):
    texts = ["", "line\nbreak\r\n\u2028", "naïve 日本語 🎉", "\x00", 'quo"te\\', "\ud800 lone surrogate"]
    with StoreWriter.create(tmp_path / "s", rows=6, columns={}, plan=plan, side_columns=(), rows_per_shard=4) as writer:
        writer.write_data({"text": text, "nested": {"list": [1, 2.5, None, True]}} for text in texts)
        for shard, start, stop in writer.pending:
            writer.write(shard, np.empty((stop - start, 0)))
    store = GradientStore.open(tmp_path / "s")
    assert [store.data(i)["text"] for i in range(6)] == texts
    assert store.data(5)["nested"] == {"list": [1, 2.5, None, True]}


def test_out_of_range_and_unknown_names_are_refused(store):
    for call, message in [
        (lambda: store.row(100), "Row 100 is not in the store, which has 100"),
        (lambda: store.row(-1), "Row -1"),
        (lambda: store.data(100), "Row 100"),
        (lambda: store.block(0, 101), "Rows 0:101 are not in the store"),
        (lambda: store.block(5, 4), "Rows 5:4"),
        (lambda: store.block(0, 1, ["bb"]), "No module 'bb' in the store; it has 2. Did you mean 'b'"),
        (lambda: store.side("los"), "No side column 'los'.* Did you mean 'loss'"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            call()


def test_a_missing_store_says_so(tmp_path):
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(StoreNotFound, match=r"no store here \(manifest.json is missing\)"):
            GradientStore.open(path)


def test_readers_see_a_growing_store_shard_by_shard(tmp_path, arrays, plan):
    path = tmp_path / "s"
    writer = StoreWriter.create(path, rows=100, columns={"a": 12}, plan=plan, rows_per_shard=30)
    seen = []
    for shard, start, stop in writer.pending:
        writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
        while len(seen) <= shard:  # each reader opens afresh and never sees a torn row
            store = GradientStore.open(path, partial=True)
            for _, a, b in store.shards:
                np.testing.assert_array_equal(store.block(a, b), arrays.rows[a:b])
            seen = store.shards
        with pytest.raises(StoreIncomplete):
            GradientStore.open(path)
    with pytest.raises(StoreIncomplete, match=r"00000\.jsonl: not written yet"):
        GradientStore.open(path, partial=True).data(0)
    writer.write_data(arrays.texts)
    writer.finish()
    assert GradientStore.open(path).data(0) == arrays.texts[0]


def test_many_shards_do_not_exhaust_maps_or_descriptors(tmp_path, make, write):
    arrays = make(60, 2)
    path = write(tmp_path / "s", arrays, rows_per_shard=1)
    store = GradientStore.open(path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for i in range(60):
        store.row(i)
        store.data(i)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 40


def test_info_describes_without_reading_a_shard(store):
    for shard in (store.path / "shards").iterdir():
        shard.unlink()
    described = info(store.path)
    assert json.loads(json.dumps(described.to_dict()))["rows"] == 100
    assert (described.width, described.modules, described.shards, described.shards_done) == (12, 2, 4, 4)
    assert described.side_columns == ("loss", "tokens", "sq_norm")
    assert described.complete


def test_info_counts_what_a_partial_store_has(tmp_path, arrays, plan):
    writer = StoreWriter.create(tmp_path / "s", rows=100, columns={"a": 12}, plan=plan, rows_per_shard=30)
    writer.write(3, arrays.rows[90:], arrays.side(90, 100))
    writer.close()
    described = info(tmp_path / "s")
    assert (described.rows, described.rows_done, described.shards, described.shards_done) == (100, 10, 4, 1)
    assert not described.complete


def test_a_store_keeps_its_own_copy_of_plan_and_meta(tmp_path, plan):
    mine = {"a": [1]}
    writer = StoreWriter.create(tmp_path / "s", rows=0, columns={}, plan=mine, meta=mine)
    mine["a"].append(2)
    writer.finish()
    store = GradientStore.open(tmp_path / "s")
    assert store.plan == store.meta == {"a": [1]}


def test_the_public_names():
    assert len(set(gradstore.__all__)) == len(gradstore.__all__)
    assert all(hasattr(gradstore, name) for name in gradstore.__all__)
    errors = [name for name in vars(gradstore) if name.startswith("Store") and name in gradstore.__all__]
    for name in errors:
        thing = getattr(gradstore, name)
        assert not (isinstance(thing, type) and issubclass(thing, Exception)) or issubclass(
            thing, gradstore.GradStoreError
        )


def test_importing_needs_no_torch():
    code = "import sys, gradstore; sys.exit('torch' in sys.modules or 'gradcore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_runs_and_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == shown
