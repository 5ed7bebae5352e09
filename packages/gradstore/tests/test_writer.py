"""The writer's door: what gets in, what is refused and in which words, and who may write."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from gradstore import (
    GradientStore,
    GradStoreError,
    InvalidInput,
    PlanMismatch,
    Side,
    StoreCorrupt,
    StoreExists,
    StoreIncomplete,
    StoreLocked,
    StoreNotFound,
    StoreUnwritable,
    StoreWriter,
    repair,
    verify,
)


def begin(path, plan, **options):
    options = {"rows": 100, "columns": {"a": 4, "b": 8}, "rows_per_shard": 30, **options}
    return StoreWriter.create(path, plan=plan, **options)


def test_pending_shrinks_as_shards_are_handed_over(tmp_path, arrays, plan):
    with begin(tmp_path / "s", plan, data=False) as writer:
        assert writer.pending == [(0, 0, 30), (1, 30, 60), (2, 60, 90), (3, 90, 100)]
        writer.write(2, arrays.rows[60:90], arrays.side(60, 90))
        assert [shard for shard, _, _ in writer.pending] == [0, 1, 3]
        for shard, start, stop in writer.pending:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    np.testing.assert_array_equal(GradientStore.open(tmp_path / "s").block(0, 100), arrays.rows)


def test_arrays_may_be_reused_at_once(tmp_path, arrays, plan):
    buffer = np.empty((30, 12), np.float32)
    with begin(tmp_path / "s", plan, data=False, side_columns=()) as writer:
        for shard, start, stop in writer.pending:
            buffer[: stop - start] = arrays.rows[start:stop]
            writer.write(shard, buffer[: stop - start])
            buffer[:] = np.nan
    np.testing.assert_array_equal(GradientStore.open(tmp_path / "s").block(0, 100), arrays.rows)


def test_side_columns_of_any_width_and_dtype(tmp_path, plan):
    columns = {"by_module": Side("fp64", 2), "count": "int64"}
    with begin(tmp_path / "s", plan, data=False, side_columns=columns, rows=3, columns={}) as writer:
        writer.write(0, np.empty((3, 0)), {"by_module": np.arange(6.0).reshape(3, 2), "count": np.arange(3) + 2**40})
    store = GradientStore.open(tmp_path / "s")
    assert store.side("by_module").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert store.side("count").tolist() == [2**40, 2**40 + 1, 2**40 + 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_non_finite_values_are_named_by_row_module_and_entry(tmp_path, arrays, plan, dtype, bad):
    arrays.rows[47, 9] = bad
    with pytest.raises(InvalidInput, match=r"Row 47, module 'b', entry 5: -?(nan|inf) is not finite"):  # noqa: PT012, SIM117
        with begin(tmp_path / "s", plan, data=False, dtype=dtype) as writer:
            for shard, start, stop in writer.pending:
                writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    with StoreWriter.resume(tmp_path / "s", plan=plan) as writer:  # what was sound stayed, the rest can be mended
        arrays.rows[47, 9] = 1
        assert 1 in [shard for shard, _, _ in writer.pending]
        for shard, start, stop in writer.pending:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    assert verify(tmp_path / "s").ok


def test_values_that_only_the_cast_makes_infinite_are_refused(tmp_path, arrays, plan):
    arrays.rows[5, 0] = np.finfo(np.float32).max  # rounds up to infinity in bfloat16
    writer = begin(tmp_path / "s", plan, data=False, dtype="bf16")
    writer.write(0, arrays.rows[:30], arrays.side(0, 30))
    with pytest.raises(InvalidInput, match=r"Row 5, module 'a', entry 0: .* overflows bf16"):
        writer.finish()
    writer.close()


def test_float64_beyond_float32_is_refused(tmp_path, arrays, plan):
    writer = begin(tmp_path / "s", plan, data=False)
    rows = arrays.rows[:30].astype(np.float64)
    rows[3, 3] = 1e300
    writer.write(0, rows, arrays.side(0, 30))
    with pytest.raises(InvalidInput, match="Row 3, module 'a', entry 3: inf is not finite"):
        writer.close()


def test_a_norm_beyond_float32_is_refused(tmp_path, arrays, plan):
    writer = begin(tmp_path / "s", plan, data=False)
    arrays.rows[7] = 3e38
    writer.write(0, arrays.rows[:30], arrays.side(0, 30))
    with pytest.raises(InvalidInput, match="Row 7: its norm overflows"):
        writer.close()


def test_a_failure_is_raised_by_the_next_call_and_the_shard_is_pending_again(tmp_path, arrays, plan):
    writer = begin(tmp_path / "s", plan, data=False)
    good = arrays.rows.copy()
    arrays.rows[0, 0] = np.nan
    with pytest.raises(InvalidInput, match="Row 0"):  # noqa: PT012
        for shard, start, stop in writer.pending * 50:
            if (shard, start, stop) in writer.pending:
                writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
            writer.data_pending  # noqa: B018
        writer.finish()
    assert 0 in [shard for shard, _, _ in writer.pending]
    for shard, start, stop in writer.pending:
        writer.write(shard, good[start:stop], arrays.side(start, stop))
    writer.finish()
    assert verify(tmp_path / "s").ok


def test_wrong_shapes_and_shards_are_refused(tmp_path, arrays, plan):
    writer = begin(tmp_path / "s", plan)
    side = arrays.side(0, 30)
    for shard, rows, sides, message in [
        (4, arrays.rows[:30], side, "There is no shard 4; the store has 4"),
        (-1, arrays.rows[:30], side, "There is no shard -1"),
        (0, arrays.rows[:29], side, r"rows of shape \(29, 12\); expected \(30, 12\)"),
        (0, arrays.rows[:30, :11], side, r"rows of shape \(30, 11\); expected \(30, 12\)"),
        (0, arrays.rows[:30], {}, r"Got side columns \[\]; the store has \['loss', 'sq_norm', 'tokens'\]"),
        (0, arrays.rows[:30], {**side, "extra": side["loss"]}, "Got side columns .*'extra'"),
        (0, arrays.rows[:30], {**side, "loss": side["loss"][:3]}, r"'loss' has shape \(3,\); expected \(30,\)"),
        (0, arrays.rows[:30], {**side, "tokens": side["loss"] + 0.5}, "'tokens' holds values that are not int32"),
        (0, arrays.rows[:30], {**side, "tokens": side["tokens"] + 2.0**40}, "'tokens' holds values that are not int32"),
        (0, arrays.rows[:30], {**side, "loss": side["loss"] * np.inf}, "Row 0: side column 'loss' is not finite"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            writer.write(shard, rows, sides)
    writer.write(0, arrays.rows[:30], side)
    with pytest.raises(InvalidInput, match="Shard 0 is already written"):
        writer.write(0, arrays.rows[:30], side)
    writer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp23"}, "Unknown dtype 'fp23'; known: .*int1. Did you mean 'fp32'"),
        ({"rows": -1}, "rows is -1"),
        ({"columns": {"": 3}}, "Column '' has width 3"),
        ({"columns": {"a": -3}}, "Column 'a' has width -3"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"side_columns": ("rows",)}, "can't be called 'rows'"),
        ({"side_columns": {"x": "f32"}}, "'x' has dtype 'f32'; known: fp32"),
        ({"side_columns": {"x": Side("fp32", 0)}}, "'x' has width 0"),
        ({"meta": {"x": float("nan")}}, "meta must be plain JSON"),
        ({"meta": object()}, "meta must be plain JSON"),
    ],
)
def test_bad_stores_are_refused_before_anything_is_made(tmp_path, plan, options, message):
    with pytest.raises(InvalidInput, match=message):
        begin(tmp_path / "s", plan, **options)
    assert not (tmp_path / "s").exists()


def test_data_rows_must_be_as_many_as_rows(tmp_path, arrays, plan):
    for count, shown in [(99, "99"), (101, "101 or more"), (0, "0"), (300, "1.. or more")]:
        writer = begin(tmp_path / str(count), plan)
        with pytest.raises(InvalidInput, match=f"write_data got {shown} rows; the store has 100"):
            writer.write_data({"i": i} for i in range(count))
        writer.close()


def test_data_that_changed_since_the_store_was_begun_is_refused(tmp_path, arrays, plan):
    writer = begin(tmp_path / "s", plan)
    writer.write_data(arrays.texts)
    writer.write_data(arrays.texts)
    arrays.texts[70]["text"] = "other"
    with pytest.raises(InvalidInput, match=r"dataset rows 60\.\.89 differ"):
        writer.write_data(arrays.texts)
    writer.close()


@pytest.mark.parametrize("bad", [float("nan"), b"bytes", object()])
def test_data_that_is_not_json_is_named_by_row_and_column(tmp_path, plan, bad):
    writer = begin(tmp_path / "s", plan)
    with pytest.raises(InvalidInput, match="Data row 1, column 'y' can't be stored as JSON"):
        writer.write_data([{"x": 1, "y": 2}, {"x": 1, "y": bad}])
    writer.close()


def test_a_store_without_data_refuses_it(tmp_path, arrays, plan):
    writer = begin(tmp_path / "s", plan, data=False)
    with pytest.raises(InvalidInput, match="data=False"):
        writer.write_data(arrays.texts)
    writer.close()


def test_finish_says_what_is_missing(tmp_path, arrays, plan):
    writer = begin(tmp_path / "s", plan)
    writer.write(0, arrays.rows[:30], arrays.side(0, 30))
    with pytest.raises(StoreIncomplete, match=r"3 of 4 shards are missing, the first is shard 1 \(rows 30\.\.59\)"):
        writer.finish()
    for shard, start, stop in writer.pending:
        writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    with pytest.raises(StoreIncomplete, match="write_data"):
        writer.finish()
    writer.write_data(arrays.texts)
    writer.finish()
    with pytest.raises(GradStoreError, match="this writer is closed"):
        writer.write(0, arrays.rows[:30], arrays.side(0, 30))


def test_an_error_in_the_block_keeps_what_was_written(tmp_path, arrays, plan):
    with pytest.raises(RuntimeError, match="mine"), begin(tmp_path / "s", plan) as writer:  # noqa: PT012
        writer.write(1, arrays.rows[30:60], arrays.side(30, 60))
        raise RuntimeError("mine")
    with pytest.raises(StoreIncomplete, match="1 of 4 shards"):
        GradientStore.open(tmp_path / "s")
    assert [s for s, _, _ in GradientStore.open(tmp_path / "s", partial=True).shards] == [1]


def test_resume_names_the_first_difference_between_plans(tmp_path, plan):
    begin(tmp_path / "s", {"model": "m", "sketch": {"kind": "two-sided", "seed": 0}, "list": [1, 2]}).close()
    for other, message in [
        (
            {"model": "m", "sketch": {"kind": "two-sided", "seed": 1}, "list": [1, 2]},
            "plan.sketch.seed is 0 .* and 1 in",
        ),
        ({"model": "m", "sketch": {"kind": "two-sided"}, "list": [1, 2]}, "plan.sketch.seed is 0 .* and missing in"),
        (
            {"model": "m", "sketch": {"kind": "two-sided", "seed": 0.0}, "list": [1, 2]},
            "plan.sketch.seed is 0 .* and 0.0",
        ),
        (
            {"model": "m", "sketch": {"kind": "two-sided", "seed": 0}, "list": [1, 3]},
            r"plan.list\[1\] is 2 .* and 3 in",
        ),
        (
            {"model": "m", "sketch": {"kind": "two-sided", "seed": 0}, "list": [1]},
            r"plan.list is \[1, 2\] .* and \[1\]",
        ),
        (
            {"model": "m", "sketch": {"kind": "two-sided", "seed": 0}, "list": [1, 2], "x": 1},
            "plan.x is missing .* and 1",
        ),
        (None, "plan is .* and null in"),
    ]:
        with pytest.raises(PlanMismatch, match=message):
            StoreWriter.resume(tmp_path / "s", plan=other)
    same = {"list": (1, 2), "sketch": {"seed": 0, "kind": "two-sided"}, "model": "m"}  # order and tuples don't matter
    StoreWriter.resume(tmp_path / "s", plan=same).close()


def test_resuming_a_finished_store_changes_nothing(store, folder_bytes, plan):
    before = folder_bytes(store.path)
    with StoreWriter.resume(store.path, plan=plan) as writer:
        assert writer.pending == []
        assert not writer.data_pending
    assert folder_bytes(store.path) == before


def test_resume_refuses_a_finished_file_that_is_gone_or_cut(store, plan):
    shard = store.path / "shards/00001.safetensors"
    with open(shard, "r+b") as file:
        file.truncate(100)
    with pytest.raises(StoreCorrupt, match=r"00001\.safetensors: 100 bytes; the journal says"):
        StoreWriter.resume(store.path, plan=plan)
    shard.unlink()
    with pytest.raises(StoreCorrupt, match=r"00001\.safetensors: missing"):
        StoreWriter.resume(store.path, plan=plan)


def test_create_refuses_a_store_a_file_and_a_full_folder(tmp_path, store, plan, folder_bytes):
    before = folder_bytes(store.path)
    with pytest.raises(StoreExists, match="holds a store already"):
        begin(store.path, plan)
    assert folder_bytes(store.path) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreExists, match="is a file"):
        begin(tmp_path / "file", plan)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("mine")
    with pytest.raises(StoreExists, match=r"not empty \('thesis.tex'"):
        begin(tmp_path / "full", plan)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_files_of_others_are_left_alone(tmp_path, store, plan, arrays):
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/data/train.csv").write_text("mine")
    with pytest.raises(StoreExists, match=r"not empty \('data/train.csv'"):
        begin(tmp_path / "mine", plan)
    assert (tmp_path / "mine/data/train.csv").read_text() == "mine"
    for name in ("notes/a.tmp", "shards/notes.txt", "report.tmp"):
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_text("mine")
    (store.path / "shards/00002.safetensors").unlink()
    repair(store.path)
    with StoreWriter.resume(store.path, plan=plan) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    assert all((store.path / name).read_text() == "mine" for name in ("notes/a.tmp", "shards/notes.txt", "report.tmp"))


def test_resume_needs_a_store(tmp_path, plan):
    with pytest.raises(StoreNotFound):
        StoreWriter.resume(tmp_path / "nothing", plan=plan)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreNotFound):
        StoreWriter.resume(tmp_path / "empty", plan=plan)
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_second_writer_is_refused_until_the_first_is_done(tmp_path, plan):
    first = begin(tmp_path / "s", plan)
    with pytest.raises(StoreLocked, match="another process is writing"):
        StoreWriter.resume(tmp_path / "s", plan=plan)
    first.close()
    StoreWriter.resume(tmp_path / "s", plan=plan).close()


def test_of_many_concurrent_creators_one_wins(tmp_path, plan):
    outcomes = []

    def create():
        try:
            outcomes.append(begin(tmp_path / "s", plan))
        except GradStoreError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writers = [outcome for outcome in outcomes if isinstance(outcome, StoreWriter)]
    assert len(writers) == 1
    assert all(isinstance(o, StoreWriter | StoreLocked | StoreExists) for o in outcomes), outcomes
    writers[0].close()


FULL_DISK = """
import resource, signal, sys
import numpy as np
from gradstore import StoreUnwritable, StoreWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails with EFBIG, as a full disk would
writer = StoreWriter.create(sys.argv[1], rows=100, columns={"a": 100}, plan={}, rows_per_shard=50, data=False,
                            side_columns=())
writer.write(0, np.ones((50, 100)))
writer.close()
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
writer = StoreWriter.resume(sys.argv[1], plan={})
writer.write(1, np.ones((50, 100)))
try:
    writer.finish()
except StoreUnwritable as error:
    print(error)
writer.close()
"""


def test_a_full_disk_is_named_and_the_store_can_be_resumed(tmp_path):
    path = tmp_path / "s"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert "00001.safetensors: can't be written (File too large)" in done.stdout
    assert "Finished shards are kept" in done.stdout
    assert sorted(p.name for p in (path / "shards").iterdir()) == ["00000.safetensors"]
    with StoreWriter.resume(path, plan={}) as writer:
        assert writer.pending == [(1, 50, 100)]
        writer.write(1, np.ones((50, 100)))
    assert verify(path).ok
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 8192
    assert signal.getsignal(signal.SIGXFSZ) is not None


def test_a_read_only_folder_is_named(tmp_path, plan):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    if os.access(tmp_path / "locked", os.W_OK):  # root ignores permission bits; /proc refuses even root
        target = "/proc/gradstore-test"
    else:
        target = tmp_path / "locked" / "s"
    with pytest.raises(StoreUnwritable, match="can't be written"):
        begin(target, plan)


def test_a_failed_fsync_loses_nothing(tmp_path, arrays, plan, monkeypatch):
    writer = begin(tmp_path / "s", plan, data=False)
    writer.write(0, arrays.rows[:30], arrays.side(0, 30))
    writer.close()

    def fail(_):
        raise OSError(28, "No space left on device")

    writer = StoreWriter.resume(tmp_path / "s", plan=plan)
    with monkeypatch.context() as patch:
        patch.setattr("gradstore._files.os.fsync", fail)
        writer.write(1, arrays.rows[30:60], arrays.side(30, 60))
        with pytest.raises(StoreUnwritable, match="No space left on device"):
            writer.close()
    writer = StoreWriter.resume(tmp_path / "s", plan=plan)
    assert [shard for shard, _, _ in writer.pending] == [1, 2, 3]
    writer.close()
