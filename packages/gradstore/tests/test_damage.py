"""Whatever happens to the bytes afterwards is found: by `verify` always, by a search that touches them, by name."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest

from gradstore import (
    FormatVersion,
    GradientStore,
    GradStoreError,
    StoreCorrupt,
    StoreUnreadable,
    StoreWriter,
    search,
    verify,
)


def flip(path, offset, bit):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def read_everything(path):
    store = GradientStore.open(path)
    search(store, np.ones((1, store.width), np.float32), 3)
    for i in range(store.rows):
        store.data(i)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, arrays, write, dtype):
    path = write(tmp_path / "s", arrays, dtype=dtype, rows_per_shard=30, columns={"a": 4, "b": 8})
    assert verify(path).ok
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = np.array([p.stat().st_size for p in files])
    rng = np.random.default_rng(0)
    for _ in range(100):  # first the file, so that small ones are hit too
        which = rng.integers(len(files))
        offset, bit = int(rng.integers(sizes[which])), int(rng.integers(8))
        flip(files[which], offset, bit)
        try:
            report = verify(path)
            assert not report.ok
            if files[which].parent != path:
                assert len(report.problems) == 1
                assert files[which].name in report.problems[0]
        except FormatVersion:
            assert files[which].name == "manifest.json"
        with pytest.raises(GradStoreError, match=files[which].name.replace(".", r"\.")):
            read_everything(path)
        flip(files[which], offset, bit)
    assert verify(path).ok
    read_everything(path)


def test_every_byte_of_the_manifest_counts(store):
    manifest = store.path / "manifest.json"
    whole = manifest.read_bytes()
    bits = np.random.default_rng(0).integers(0, 8, len(whole))
    for offset, bit in enumerate(bits.tolist()):
        changed = bytearray(whole)
        changed[offset] ^= 1 << bit
        manifest.write_bytes(changed)
        with pytest.raises((StoreCorrupt, FormatVersion)):
            GradientStore.open(store.path)


@pytest.mark.parametrize("file", ["shards/00001.safetensors", "data/00001.jsonl", "data/00001.offsets.npy"])
@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "missing"])
def test_cut_and_missing_files_are_named(store, file, damage):
    path = store.path / file
    if damage == "missing":
        path.unlink()
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else b"")
    GradientStore.open(store.path)  # opening touches no shard
    with pytest.raises(StoreCorrupt, match=path.name):
        read_everything(store.path)
    report = verify(store.path)
    assert len(report.problems) == 1
    assert path.name in report.problems[0]


def test_a_missing_or_cut_journal_is_named(store):
    journal = store.path / "journal.jsonl"
    whole = journal.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\n"):
        journal.write_bytes(damaged)
        with pytest.raises(StoreCorrupt, match="journal is damaged or missing"):
            GradientStore.open(store.path)
    journal.unlink()
    with pytest.raises(StoreCorrupt, match="journal is damaged or missing"):
        GradientStore.open(store.path)
    assert not verify(store.path).ok


@pytest.mark.parametrize("file", ["manifest.json", "journal.jsonl", "shards/00001.safetensors", "data/00001.jsonl"])
def test_files_that_the_disk_does_not_hand_over_are_named(store, file, monkeypatch):
    real = io.open

    def refusing(path, *args, **kwargs):
        if str(path).endswith(file):
            raise OSError(5, "Input/output error")  # what a failing disk says; root ignores permission bits
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr(io, "open", refusing)
    with pytest.raises(StoreUnreadable, match=rf"{file.replace('.', '[.]')}: can't be read \(Input/output error"):
        read_everything(store.path)


def test_shards_that_changed_places_are_found(store):
    one, two = (store.path / f"shards/0000{i}.safetensors" for i in (0, 1))
    shutil.move(one, store.path / "x")
    shutil.move(two, one)
    shutil.move(store.path / "x", two)
    with pytest.raises(StoreCorrupt, match="checksum"):
        store.block(0, 60)
    assert len(verify(store.path).problems) == 2


def test_foreign_files_are_reported_and_do_no_harm(store):
    (store.path / "shards/notes.txt").write_text("mine")
    assert "notes.txt: a file that the journal does not know" in verify(store.path).problems[0]
    read_everything(store.path)


def test_rows_that_are_not_finite_are_found_even_with_a_right_checksum(store, arrays, tmp_path, write, monkeypatch):
    arrays.rows[44, 3] = np.nan
    monkeypatch.setattr(StoreWriter, "_require_finite", lambda *_: None)
    path = write(tmp_path / "nan", arrays, rows_per_shard=30)
    report = verify(path)
    assert "00001.safetensors: row 44: 'rows' is not finite" in report.problems[0]


def test_damage_while_being_written_is_refused(tmp_path, arrays, plan):
    writer = StoreWriter.create(tmp_path / "s", rows=100, columns={"a": 12}, plan=plan, rows_per_shard=30)
    for shard in (0, 1):
        writer.write(shard, arrays.rows[shard * 30 : shard * 30 + 30], arrays.side(shard * 30, shard * 30 + 30))
    writer.close()
    journal = tmp_path / "s/journal.jsonl"
    first, second, _ = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"gibberish\n" + second + b"\n")
    with pytest.raises(StoreCorrupt, match="line 1 is damaged"):
        GradientStore.open(tmp_path / "s", partial=True)
    with pytest.raises(StoreCorrupt, match="line 1 is damaged"):
        StoreWriter.resume(tmp_path / "s", plan=plan)
    assert not verify(tmp_path / "s").ok
    assert first
