"""Repair keeps every sound file, names every lost one, and what is rebuilt has the old bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gradstore import GradientStore, StoreCorrupt, StoreLocked, StoreNotFound, StoreWriter, repair, verify


def rebuild(path, arrays, plan):
    with StoreWriter.resume(path, plan=plan) as writer:
        missing = writer.pending
        writer.write_data(arrays.texts)
        for shard, start, stop in missing:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    return [shard for shard, _, _ in missing]


def test_a_sound_store_is_left_alone(store, folder_bytes):
    before = folder_bytes(store.path)
    report = repair(store.path)
    assert not report.changed
    assert report.kept == 12
    assert folder_bytes(store.path) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_lost_files_are_named_and_only_they_are_rebuilt(store, arrays, plan, folder_bytes, damage):
    before = folder_bytes(store.path)
    for name in ("shards/00001.safetensors", "data/00003.jsonl"):
        file = store.path / name
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 4
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(raw if damage == "flip" else raw[:-3])
    report = repair(store.path)
    assert report.lost == (("shards/00001.safetensors", 30, 60), ("data/00003.jsonl", 90, 100))
    assert (report.kept, report.torn_lines) == (10, 0)
    assert json.loads(json.dumps(report.to_dict()))["changed"]
    assert rebuild(store.path, arrays, plan) == [1]
    assert folder_bytes(store.path) == before


def test_a_damaged_journal_costs_only_what_it_no_longer_knows(store, arrays, plan, folder_bytes):
    before = folder_bytes(store.path)
    journal = store.path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(
        b"".join([*lines[:9], lines[9][:20] + b"?" + lines[9][21:], *lines[10:]]).replace(b'"bytes"', b'"bytes"')
    )
    report = repair(store.path)
    assert [name for name, _, _ in report.lost] == ["shards/00001.safetensors"]
    assert rebuild(store.path, arrays, plan) == [1]
    assert folder_bytes(store.path) == before


def test_a_lost_journal_costs_everything_but_the_plan(store, arrays, plan, folder_bytes):
    before = folder_bytes(store.path)
    (store.path / "journal.jsonl").unlink()
    assert len(repair(store.path).lost) == 12
    assert rebuild(store.path, arrays, plan) == [0, 1, 2, 3]
    assert folder_bytes(store.path) == before


def test_a_torn_tail_is_dropped(tmp_path, arrays, plan):
    writer = StoreWriter.create(tmp_path / "s", rows=100, columns={"a": 12}, plan=plan, rows_per_shard=30)
    writer.write(0, arrays.rows[:30], arrays.side(0, 30))
    writer.close()
    with open(tmp_path / "s/journal.jsonl", "ab") as file:
        file.write(b'{"file": "shards/00001.safe')
    report = repair(tmp_path / "s")
    assert (report.lost, report.torn_lines, report.kept) == ((), 1, 1)
    assert not repair(tmp_path / "s").changed
    assert rebuild(tmp_path / "s", arrays, plan) == [1, 2, 3]
    assert verify(tmp_path / "s").ok


def test_flips_anywhere_are_repaired_to_the_same_bytes(store, arrays, plan, folder_bytes):
    before = folder_bytes(store.path)
    rng = np.random.default_rng(0)
    names = [name for name, raw in before.items() if raw and name != "manifest.json"]
    for _ in range(40):
        name = names[rng.integers(len(names))]
        raw = bytearray(before[name])
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        (store.path / name).write_bytes(raw)
        assert repair(store.path).changed
        rebuild(store.path, arrays, plan)
        assert folder_bytes(store.path) == before


def test_what_can_not_be_repaired(tmp_path, store, plan):
    with pytest.raises(StoreNotFound):
        repair(tmp_path / "nothing")
    manifest = store.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows": 100', b'"rows": 101'))
    with pytest.raises(StoreCorrupt, match="manifest is damaged"):
        repair(store.path)
    writer = StoreWriter.create(tmp_path / "busy", rows=1, columns={}, plan=plan)
    with pytest.raises(StoreLocked):
        repair(tmp_path / "busy")
    writer.close()
    with pytest.raises(StoreCorrupt):
        GradientStore.open(store.path)
