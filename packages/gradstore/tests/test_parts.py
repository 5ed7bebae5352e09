"""Several processes write one store: each its own shards, counted in by the one that owns it."""

from __future__ import annotations

import pytest

from gradstore import GradientStore, InvalidInput, StoreIncomplete, StoreLocked, StoreWriter, verify

OPTIONS = {"rows": 100, "columns": {"a": 12}, "rows_per_shard": 10}


def put(writer, arrays, shards):
    for shard, start, stop in writer.pending:
        if shard in shards:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))


def contents(path):
    return {each.name: each.read_bytes() for each in path.rglob("*") if each.is_file()}


def test_three_writers_make_the_bytes_of_one(tmp_path, arrays, plan, write):
    whole = write(tmp_path / "whole", arrays, rows_per_shard=10)
    with StoreWriter.create(tmp_path / "s", plan=plan, **OPTIONS) as owner:
        with StoreWriter.join(owner.path, 1) as one, StoreWriter.join(owner.path, 2) as two:
            put(two, arrays, {2, 5, 8})
            put(one, arrays, {1, 4, 7})
            put(owner, arrays, {0, 3, 6, 9})
        owner.write_data(arrays.texts)
    assert contents(tmp_path / "s") == contents(whole)
    assert not (tmp_path / "s" / "parts").exists()
    assert verify(tmp_path / "s").ok


def test_what_a_part_wrote_outlives_the_owner(tmp_path, arrays, plan, write):
    owner = StoreWriter.create(tmp_path / "s", plan=plan, **OPTIONS)
    with StoreWriter.join(owner.path, 1) as part:
        put(part, arrays, {1, 4})
    owner.close()  # as a kill would, before the parts were counted in
    torn = tmp_path / "s" / "parts" / "1.jsonl"
    torn.write_bytes(torn.read_bytes() + b'{"file": "shards/0000')
    with StoreWriter.resume(tmp_path / "s", plan=plan) as again:
        assert {shard for shard, _, _ in again.pending} == set(range(10)) - {1, 4}
        put(again, arrays, set(range(10)))
        again.write_data(arrays.texts)
    assert contents(tmp_path / "s") == contents(write(tmp_path / "whole", arrays, rows_per_shard=10))


def test_a_part_does_not_finish_the_store(tmp_path, arrays, plan):
    owner = StoreWriter.create(tmp_path / "s", plan=plan, data=False, **OPTIONS)
    with StoreWriter.join(owner.path, 1) as part:
        put(part, arrays, {1})
    assert not GradientStore.open(tmp_path / "s", partial=True).complete
    with pytest.raises(StoreIncomplete, match="9 of 10 shards"):
        owner.finish()
    owner.close()


def test_a_part_that_still_lives_keeps_the_store(tmp_path, plan):
    owner = StoreWriter.create(tmp_path / "s", plan=plan, data=False, **OPTIONS)
    part = StoreWriter.join(owner.path, 1)
    with pytest.raises(StoreLocked):
        StoreWriter.join(owner.path, 1)
    owner.close()
    with pytest.raises(StoreLocked):
        StoreWriter.resume(tmp_path / "s", plan=plan)
    part.close()
    StoreWriter.resume(tmp_path / "s", plan=plan).close()


def test_what_a_part_cannot_write_is_raised_by_flush(tmp_path, arrays, plan):
    owner = StoreWriter.create(tmp_path / "s", plan=plan, data=False, **OPTIONS)
    part = StoreWriter.join(owner.path, 1)
    arrays.rows[11, 3] = float("nan")
    part.write(1, arrays.rows[10:20], arrays.side(10, 20))
    with pytest.raises(InvalidInput, match="Row 11"):
        part.flush()
    part.close()
    owner.close()


def test_parts_of_a_store_that_was_never_born_are_forgotten(tmp_path, plan):
    (tmp_path / "s" / "parts").mkdir(parents=True)
    (tmp_path / "s" / "parts" / "1.jsonl").write_text(
        '{"file": "shards/00001.safetensors", "bytes": 1, "xxh3_128": "0"}\n'
    )
    owner = StoreWriter.create(tmp_path / "s", plan=plan, data=False, **OPTIONS)
    assert len(owner.pending) == 10
    owner.close()


def test_a_part_s_file_that_is_gone_is_written_again(tmp_path, arrays, plan):
    owner = StoreWriter.create(tmp_path / "s", plan=plan, data=False, **OPTIONS)
    with StoreWriter.join(owner.path, 1) as part:
        put(part, arrays, {1, 4})
    owner.close()
    (tmp_path / "s" / "shards" / "00004.safetensors").unlink()
    again = StoreWriter.resume(tmp_path / "s", plan=plan)
    assert {shard for shard, _, _ in again.pending} == set(range(10)) - {1}
    again.close()
