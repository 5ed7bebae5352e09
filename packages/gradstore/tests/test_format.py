"""docs/store-format.md, sentence by sentence: `test_b4_…` proves sentence B4."""

from __future__ import annotations

import json
import os
import re
import socket
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load as load_safetensors

from gradstore import (
    FormatVersion,
    GradientStore,
    InvalidInput,
    StoreCorrupt,
    StoreIncomplete,
    StoreLocked,
    StoreUnwritable,
    StoreWriter,
    merge,
    repair,
    verify,
)

DOCS = Path(__file__).parents[3] / "docs/store-format.md"


def xxh(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def manifest(store) -> dict:
    return json.loads((store.path / "manifest.json").read_bytes())


def journal(path) -> list[dict]:
    return [json.loads(line) for line in (path / "journal.jsonl").read_bytes().splitlines()]


def tensors(path, shard=0) -> dict[str, np.ndarray]:
    """A shard read without gradstore; bfloat16 through its bits."""
    raw = (path / f"shards/{shard:05d}.safetensors").read_bytes()
    if b'"BF16"' in raw[:500]:
        raw = raw.replace(b'"dtype":"BF16"', b'"dtype":"U16" ', 1)
    return load_safetensors(raw)


def begun(path, arrays, plan, shards=()):
    writer = StoreWriter.create(path, rows=100, columns={"a": 12}, plan=plan, rows_per_shard=30)
    for shard, start, stop in writer.pending:
        if shard in shards:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    return writer


@pytest.mark.skipif(not DOCS.exists(), reason="the page lies in the repository, not in the wheel")
def test_every_sentence_has_a_test_and_every_test_a_sentence():
    sentences = set(re.findall(r"^- \*\*([A-H]\d+)\*\*", DOCS.read_text(), re.MULTILINE))
    tests = {m[1].upper() for name in globals() if (m := re.match(r"test_([a-h]\d+)_", name))}
    assert sentences == tests
    assert len(sentences) > 40


@pytest.mark.skipif(not DOCS.exists(), reason="the page lies in the repository, not in the wheel")
def test_every_line_of_what_goes_wrong_has_its_test():
    table = DOCS.read_text().split("## What goes wrong")[1].split("\n## ")[0]
    named = re.findall(r"\| `(\w+)` \|$", table, re.MULTILINE)
    assert len(named) == len(re.findall(r"^\| (?!what happened)\w", table, re.MULTILINE)) > 15
    there = {
        m for file in Path(__file__).parent.glob("test_*.py") for m in re.findall(r"def test_(\w+)", file.read_text())
    }
    assert set(named) <= there


def test_a1_files(store):
    files = {p.relative_to(store.path).as_posix() for p in store.path.rglob("*") if p.is_file()}
    shards = {f"shards/0000{i}.safetensors" for i in range(4)}
    data = {f"data/0000{i}.{end}" for i in range(4) for end in ("jsonl", "offsets.npy")}
    assert files == {"manifest.json", "journal.jsonl", "writer.lock"} | shards | data
    assert (store.path / "writer.lock").stat().st_size == 0


def test_a2_a_row_stands_where_its_number_says(store, arrays):
    for i in range(100):
        np.testing.assert_array_equal(tensors(store.path, i // 30)["rows"][i % 30], arrays.rows[i])


def test_a3_shards_are_full_but_the_last(store):
    assert [len(tensors(store.path, shard)["rows"]) for shard in range(4)] == [30, 30, 30, 10]


def test_a4_no_rows_no_shards(tmp_path, make, write):
    path = write(tmp_path / "s", make(0, 4))
    assert list(path.glob("*/*")) == []
    assert verify(path).ok


def test_a5_shard_numbers():
    from gradstore._writer import shard_file

    assert shard_file(7) == "shards/00007.safetensors"
    assert shard_file(123456) == "shards/123456.safetensors"


def test_a6_same_arguments_same_bytes(tmp_path, arrays, write, folder_bytes):
    one = write(tmp_path / "one", arrays, rows_per_shard=30, dtype="fp16")
    two = write(tmp_path / "two", arrays, rows_per_shard=30, dtype="fp16", order=-1)
    assert folder_bytes(one) == folder_bytes(two)  # kills: test_kill.py


def test_a7_nothing_of_the_machine_gets_in(store, folder_bytes):
    everything = b"".join(folder_bytes(store.path).values())
    for trace in (str(store.path), socket.gethostname(), str(Path.home())):
        assert trace.encode() not in everything
    assert not re.search(rb"20[2-9]\d-\d\d-\d\d|\b1[7-9]\d{8}\b", everything)


def test_b1_the_manifest_begins_with_its_checksum(store):
    raw = (store.path / "manifest.json").read_bytes()
    assert re.match(rb'\{\n  "checksum": "[0-9a-f]{32}"', raw)
    assert isinstance(json.loads(raw.decode("utf-8")), dict)


def test_b2_the_checksum_is_of_the_file_with_zeros_in_its_place(store):
    raw = (store.path / "manifest.json").read_bytes()
    digits = json.loads(raw)["checksum"].encode()
    assert xxh(raw.replace(digits, b"0" * 32, 1)).encode() == digits


def test_b3_format_and_version(store):
    assert (manifest(store)["format"], manifest(store)["version"]) == ("gradstore", 1)


@pytest.mark.parametrize("version", [0, 2, 99, None, "1", 1.5])
def test_b4_other_versions_are_refused(store, version):
    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', f'"version": {json.dumps(version)}'))
    for call in (GradientStore.open, verify, lambda p: StoreWriter.resume(p, plan={})):
        with pytest.raises(FormatVersion, match=re.escape(f"format version {version!r}; this reader knows version 1")):
            call(store.path)


def test_b5_rows(tmp_path, arrays, write):
    for dtype in ("fp32", "fp16", "bf16", "int8", "int4", "int2", "int1"):
        store = GradientStore.open(write(tmp_path / dtype, arrays, dtype=dtype, rows_per_shard=7))
        fields = manifest(store)
        assert (fields["rows"], fields["rows_per_shard"], fields["dtype"]) == (100, 7, dtype)


def test_b6_columns_in_row_order(tmp_path, arrays, write):
    columns = {"z": 5, "a": 3, "m": 4}
    store = GradientStore.open(write(tmp_path / "s", arrays, columns=columns))
    assert list(manifest(store)["columns"].items()) == list(columns.items())
    np.testing.assert_array_equal(store.block(0, 100, ["a"]), arrays.rows[:, 5:8])


def test_b7_side_columns(store):
    assert manifest(store)["side"] == {
        "loss": {"dtype": "fp32", "width": None},
        "tokens": {"dtype": "int32", "width": None},
        "sq_norm": {"dtype": "fp32", "width": None},
    }


def test_b8_without_data(tmp_path, arrays, plan):
    with StoreWriter.create(
        tmp_path / "s", rows=2, columns={"a": 12}, plan=plan, data=False, side_columns=()
    ) as writer:
        writer.write(0, arrays.rows[:2])
    store = GradientStore.open(tmp_path / "s")
    assert manifest(store)["data"] is False
    assert list((tmp_path / "s/data").iterdir()) == []
    assert verify(store.path).ok
    with pytest.raises(InvalidInput, match="without its dataset"):
        store.data(0)


def test_b9_plan_and_its_hash(store, plan):
    fields = manifest(store)
    assert fields["plan"] == plan
    assert fields["plan_hash"] == xxh(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode())


def test_b10_meta(tmp_path, arrays, write):
    meta = {"dataset": ["stories", None, 1.5, True], "ü": {}}
    store = GradientStore.open(write(tmp_path / "s", arrays, meta=meta))
    assert manifest(store)["meta"] == store.meta == meta


def test_b11_complete_comes_last(tmp_path, arrays, plan):
    writer = begun(tmp_path / "s", arrays, plan, shards=range(4))
    writer.write_data(arrays.texts)
    assert json.loads((tmp_path / "s/manifest.json").read_bytes())["complete"] is False
    writer.finish()
    assert json.loads((tmp_path / "s/manifest.json").read_bytes())["complete"] is True


def test_b12_seals(tmp_path, arrays, plan, store):
    begun(tmp_path / "t", arrays, plan).close()
    assert json.loads((tmp_path / "t/manifest.json").read_bytes())["journal"] is None
    assert manifest(store)["journal"] == xxh((store.path / "journal.jsonl").read_bytes())
    for line in journal(store.path):
        assert line["xxh3_128"] == xxh((store.path / line["file"]).read_bytes())
    sealed = {line["file"] for line in journal(store.path)}
    assert {p.relative_to(store.path).as_posix() for p in store.path.glob("*/*")} == sealed


def test_c1_journal_lines(store):
    for line in journal(store.path):
        raw = (store.path / line["file"]).read_bytes()
        assert line == {"file": line["file"], "bytes": len(raw), "xxh3_128": xxh(raw)}


def test_c2_the_finished_journal_is_sorted(tmp_path, arrays, write):
    path = write(tmp_path / "s", arrays, rows_per_shard=9, order=-1)
    files = [line["file"] for line in journal(path)]
    assert files == sorted(files)


def test_c3_files_without_a_line_do_not_count(tmp_path, arrays, plan, store):
    begun(tmp_path / "t", arrays, plan, shards=[0]).close()
    whole = (store.path / "shards/00001.safetensors").read_bytes()
    (tmp_path / "t/shards/00001.safetensors").write_bytes(whole)
    assert [s for s, _, _ in GradientStore.open(tmp_path / "t", partial=True).shards] == [0]
    writer = StoreWriter.resume(tmp_path / "t", plan=plan)
    assert [s for s, _, _ in writer.pending] == [1, 2, 3]
    writer.close()


@pytest.mark.parametrize("kept", [0, 1])  # threads finish shards in any order
def test_c4_a_torn_line_does_not_count(tmp_path, arrays, plan, kept):
    begun(tmp_path / "s", arrays, plan, shards=[0, 1]).close()
    path = tmp_path / "s/journal.jsonl"
    lines = sorted(path.read_bytes().splitlines(keepends=True), key=lambda line: json.loads(line)["file"])
    first, second = lines[kept], lines[1 - kept]
    for length in range(len(second)):
        path.write_bytes(first + second[:length])
        assert [s for s, _, _ in GradientStore.open(tmp_path / "s", partial=True).shards] == [kept]
    writer = StoreWriter.resume(tmp_path / "s", plan=plan)
    assert [s for s, _, _ in writer.pending] == [1 - kept, 2, 3]
    assert path.read_bytes() == first
    writer.close()


def test_c5_other_unreadable_lines_are_damage(tmp_path, arrays, plan):
    begun(tmp_path / "s", arrays, plan, shards=[0, 1]).close()
    path = tmp_path / "s/journal.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"\n" + second, b'{"file": 1}\n' + second, first + b"[]\n", b"\xff\xfe\n"):
        path.write_bytes(damaged)
        with pytest.raises(StoreCorrupt, match=r"line . is damaged"):
            GradientStore.open(tmp_path / "s", partial=True)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4", "int2", "int1"])
def test_d1_shards_are_safetensors(tmp_path, arrays, write, dtype):
    path = write(tmp_path / "s", arrays, dtype=dtype)
    from safetensors import safe_open

    with safe_open(path / "shards/00000.safetensors", "np") as file:  # its own validation: no holes, no overlaps
        assert {"norm", "loss", "tokens", "sq_norm"} < set(file.keys())
        for name in file.keys():  # noqa: SIM118
            assert file.get_slice(name).get_shape()[0] == 100


def header(path) -> tuple[int, dict]:
    raw = (path / "shards/00000.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length, json.loads(raw[8 : 8 + length])


def test_d2_data_starts_on_a_page(store):
    start, _ = header(store.path)
    assert start % 4096 == 0
    raw = (store.path / "shards/00000.safetensors").read_bytes()[:start]
    assert raw[-1:] == b" "


def test_d3_tensors_are_aligned(tmp_path, make, plan):
    size = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    for dtype in ("fp32", "fp16", "bf16"):
        path, arrays = tmp_path / dtype, make(7, 3)
        side = {"d": "fp64", "i": "int32", "l": "int64", "f": "fp32"}
        with StoreWriter.create(
            path, rows=7, columns={"a": 3}, plan=plan, dtype=dtype, side_columns=side, data=False
        ) as writer:
            writer.write(0, arrays.rows, {name: np.arange(7) for name in side})
        _, fields = header(path)
        del fields["__metadata__"]
        placed = sorted(fields.items(), key=lambda item: item[1]["data_offsets"])
        assert all(spec["data_offsets"][0] % size[spec["dtype"]] == 0 for _, spec in placed)
        sizes = [size[spec["dtype"]] for _, spec in placed]
        assert sizes == sorted(sizes, reverse=True)
        widest = size[fields["rows"]["dtype"]]
        assert next(name for name, spec in placed if size[spec["dtype"]] == widest) == "rows"


def test_d4_rows(tmp_path, arrays, write):
    for dtype in ("fp32", "fp16", "bf16"):
        path = write(tmp_path / dtype, arrays, dtype=dtype)
        rows = tensors(path)["rows"]
        assert rows.shape == (100, 12)
        if dtype == "fp32":
            np.testing.assert_array_equal(rows, arrays.rows)


def test_d5_fp16_scale(tmp_path, make, write):
    arrays = make(64, 5)
    arrays.rows *= np.logspace(-18, 18, 64, dtype=np.float64)[:, None].astype(np.float32)
    arrays.sq_norm[:] = 0
    arrays.rows[9] = 0
    stored = tensors(write(tmp_path / "s", arrays, dtype="fp16"))
    rows, scale = stored["rows"].astype(np.float64), stored["scale"]
    assert scale.dtype == np.float32
    assert scale[9] == 1
    np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)  # powers of two
    largest = np.delete(np.abs(arrays.rows).max(1) / scale, 9)
    assert ((largest >= 2**14) & (largest < 2**15)).all()
    assert (np.abs(rows * scale[:, None] - arrays.rows) <= 2**-11 * np.abs(arrays.rows)).all()


def test_d6_scales_are_normal_numbers(tmp_path, make, write):
    arrays = make(3, 2)
    arrays.rows[:] = np.array([[1e-45, 0], [3e38, 0], [1, 1]], np.float32)
    arrays.sq_norm[:] = 0
    scale = tensors(write(tmp_path / "s", arrays, dtype="fp16"))["scale"]
    assert scale[:2].tolist() == [2.0**-100, 2.0**113]


def test_d7_bfloat16_rounds_to_nearest_even(tmp_path, make, write):
    arrays = make(1, 6)
    step = 2.0**-7  # spacing of bfloat16 in [1, 2)
    arrays.rows[0] = [1 + step / 2, 1 + 3 * step / 2, 1 + step * 0.51, 1 + step * 0.49, -1 - step / 2, 1.5]
    store = GradientStore.open(write(tmp_path / "s", arrays, dtype="bf16"))
    assert store.row(0).tolist() == [1, 1 + 2 * step, 1 + step, 1, -1, 1.5]
    bits = tensors(store.path)["rows"].view(np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(bits.view(np.float32), store.block(0, 1))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4", "int2", "int1"])
def test_d8_norm(tmp_path, arrays, write, dtype):
    store = GradientStore.open(write(tmp_path / "s", arrays, dtype=dtype))
    expected = np.linalg.norm(store.block(0, 100).astype(np.float64), axis=1)
    np.testing.assert_allclose(tensors(store.path)["norm"], expected, rtol=1e-7)


def test_d9_side_columns_are_tensors(store, arrays):
    stored = tensors(store.path, 1)
    for name in ("loss", "tokens", "sq_norm"):
        np.testing.assert_array_equal(stored[name], getattr(arrays, name)[30:60])


@pytest.mark.parametrize("name", ["rows", "scale", "norm", "plane0", "plane7"])
def test_d10_reserved_names(tmp_path, plan, name):
    with pytest.raises(InvalidInput, match=f"can't be called '{name}'"):
        StoreWriter.create(tmp_path / "s", rows=1, columns={"a": 1}, plan=plan, side_columns=(name,))


def test_d11_nothing_infinite(tmp_path, arrays, plan):
    arrays.rows[50, 3] = np.inf
    writer = begun(tmp_path / "s", arrays, plan, shards=[1])
    with pytest.raises(InvalidInput, match="Row 50, module 'a', entry 3: inf is not finite"):
        writer.close()
    assert list((tmp_path / "s/shards").iterdir()) == []


def planes_without_us(path, dtype, widths, read=None) -> tuple[np.ndarray, np.ndarray]:
    """Codes [m, D] of the first `read` planes and the scale of each entry [m, D], by the page alone."""
    stored = tensors(path)
    bits = int(dtype[3:])
    codes = np.zeros((len(stored["norm"]), sum(widths)), int)
    for plane in range(read or bits):
        columns = np.unpackbits(stored[f"plane{plane}"], axis=1)
        start, parts = 0, []
        for width in widths:
            parts.append(columns[:, start : start + width])
            start += -(-width // 8) * 8
        codes = 2 * codes + np.concatenate(parts, axis=1)
    return codes, np.repeat(stored["scale"], widths, axis=1)


QUANTISED = pytest.mark.parametrize("dtype", ["int8", "int4", "int2", "int1"])


@QUANTISED
def test_d12_planes(tmp_path, arrays, write, dtype):
    path = write(tmp_path / "s", arrays, dtype=dtype, columns={"a": 3, "b": 9})
    stored, bits = tensors(path), int(dtype[3:])
    assert {name for name in stored if name.startswith("plane")} == {f"plane{p}" for p in range(bits)}
    assert all(stored[f"plane{p}"].shape == (100, 1 + 2) for p in range(bits))
    assert all(stored[f"plane{p}"].dtype == np.uint8 for p in range(bits))
    first = np.unpackbits(stored["plane0"], axis=1)  # the most significant bit says which side of zero
    np.testing.assert_array_equal(first[:, [0, 1, 2, *range(8, 17)]], arrays.rows >= 0)


@QUANTISED
def test_d13_codes_are_read_with_the_scale(tmp_path, arrays, write, dtype):
    path = write(tmp_path / "s", arrays, dtype=dtype, columns={"a": 3, "b": 9})
    codes, scale = planes_without_us(path, dtype, (3, 9))
    expected = (codes - (2 ** int(dtype[3:]) - 1) / 2).astype(np.float32) * scale
    np.testing.assert_array_equal(GradientStore.open(path).block(0, 100), expected)


@QUANTISED
def test_d14_codes(tmp_path, arrays, write, dtype):
    path, bits = write(tmp_path / "s", arrays, dtype=dtype, columns={"a": 3, "b": 9}), int(dtype[3:])
    codes, _ = planes_without_us(path, dtype, (3, 9))
    for columns in (slice(0, 3), slice(3, 12)):
        x = arrays.rows[:, columns].astype(np.float64)
        rms, largest = np.sqrt((x**2).mean(1, keepdims=True)), np.abs(x).max(1, keepdims=True)
        step = {8: largest / 127.5, 4: 0.3352 * rms, 2: 0.9957 * rms, 1: rms}[bits]
        expected = np.clip(np.floor(x / step) + 2 ** (bits - 1), 0, 2**bits - 1)
        assert (codes[:, columns] != expected).mean() < 1e-3  # x / step against x * (1 / step)


@QUANTISED
def test_d15_scales(tmp_path, arrays, write, dtype):
    arrays.rows[17] = 0
    path = write(tmp_path / "s", arrays, dtype=dtype, columns={"a": 3, "b": 9})
    codes, scale = planes_without_us(path, dtype, (3, 9))
    centred = codes - (2 ** int(dtype[3:]) - 1) / 2
    for columns in (slice(0, 3), slice(3, 12)):
        c, x = centred[:, columns], arrays.rows[:, columns]
        np.testing.assert_allclose(scale[:, columns.start], (c * x).sum(1) / (c * c).sum(1), rtol=1e-6)
    assert (scale[17] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "read"), [("int8", 1), ("int8", 2), ("int8", 4), ("int4", 1), ("int4", 2), ("int2", 1)]
)
def test_d16_prefixes(tmp_path, arrays, write, dtype, read):
    path = write(tmp_path / "s", arrays, dtype=dtype, columns={"a": 3, "b": 9})
    codes, scale = planes_without_us(path, dtype, (3, 9), read)
    expected = (codes - (2**read - 1) / 2) * (scale * 2.0 ** (int(dtype[3:]) - read))
    coarse = GradientStore.open(path).shard(0).cut(40, 41).values(bits=read)
    np.testing.assert_allclose(coarse[0], expected[40], rtol=1e-6)


def test_e1_lines(store, arrays):
    lines = (store.path / "data/00001.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == arrays.texts[30:60]
    assert lines[-1] == ""


def test_e2_offsets(store, arrays):
    raw = (store.path / "data/00003.offsets.npy").read_bytes()
    assert raw[:8] == b"\x93NUMPY\x01\x00"
    offsets = np.load(store.path / "data/00003.offsets.npy")
    assert (offsets.dtype, offsets.shape) == (np.dtype("<i8"), (11,))
    lines = (store.path / "data/00003.jsonl").read_bytes()
    assert [json.loads(lines[a:b]) for a, b in pairwise(offsets)] == arrays.texts[90:]


def test_e3_lone_surrogates(tmp_path, make, write):
    arrays = make(1, 1)
    arrays.texts[0]["text"] = "ü \ud800"
    path = write(tmp_path / "s", arrays)
    assert b"\\ud800" in (path / "data/00000.jsonl").read_bytes()
    assert GradientStore.open(path).data(0)["text"] == "ü \ud800"


def test_f1_the_order_of_steps(tmp_path, arrays, plan, monkeypatch):
    writer = begun(tmp_path / "s", arrays, plan)
    steps = []
    real_replace, real_write = os.replace, os.write

    def name(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: steps.append(("sync", name(fd))))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(("rename", a.name, b.name)), real_replace(a, b)))
    monkeypatch.setattr(os, "write", lambda fd, data: (steps.append(("append", name(fd))), real_write(fd, data))[1])
    writer.write(0, arrays.rows[:30], arrays.side(0, 30))
    writer.close()
    assert steps == [
        ("sync", "00000.safetensors.tmp"),
        ("rename", "00000.safetensors.tmp", "00000.safetensors"),
        ("sync", "shards"),
        ("append", "journal.jsonl"),
        ("sync", "journal.jsonl"),
    ]


def test_f2_resuming_rewrites_only_what_is_missing(tmp_path, arrays, plan):
    begun(tmp_path / "s", arrays, plan, shards=[0, 2]).close()  # kills: test_kill.py
    before = {p.name: p.stat().st_ino for p in (tmp_path / "s/shards").iterdir()}
    with StoreWriter.resume(tmp_path / "s", plan=plan) as writer:
        assert [shard for shard, _, _ in writer.pending] == [1, 3]
        writer.write_data(arrays.texts)
        for shard, start, stop in writer.pending:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    after = {p.name: p.stat().st_ino for p in (tmp_path / "s/shards").iterdir()}
    assert {name: after[name] for name in before} == before


def test_f3_leftovers_are_removed(tmp_path, arrays, plan):
    begun(tmp_path / "s", arrays, plan, shards=[0]).close()
    leftovers = ["manifest.json.tmp", "journal.jsonl.tmp", "shards/00001.safetensors.tmp", "data/00000.jsonl"]
    for leftover in leftovers:
        (tmp_path / "s" / leftover).write_text("half")
    StoreWriter.resume(tmp_path / "s", plan=plan).close()
    assert not any((tmp_path / "s" / leftover).exists() for leftover in leftovers)
    assert (tmp_path / "s/shards/00000.safetensors").exists()


def test_f4_one_writer(tmp_path, arrays, plan):
    writer = begun(tmp_path / "s", arrays, plan, shards=[0])
    with pytest.raises(StoreLocked):
        StoreWriter.resume(tmp_path / "s", plan=plan)
    GradientStore.open(tmp_path / "s", partial=True)
    writer.close()


def test_f5_finishing_is_two_renames(tmp_path, arrays, plan, monkeypatch):
    writer = begun(tmp_path / "s", arrays, plan, shards=range(4))
    writer.write_data(arrays.texts)
    while writer.data_pending or len(list((tmp_path / "s/shards").glob("*.safetensors"))) < 4:
        pass
    writer._drain()
    renames, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renames.append(b.name), real(a, b)))
    writer.finish()
    assert renames == ["journal.jsonl", "manifest.json"]


def test_f6_partial_stores_are_asked_for(tmp_path, arrays, plan):
    begun(tmp_path / "s", arrays, plan, shards=[1, 3]).close()
    with pytest.raises(StoreIncomplete, match=r"unfinished \(2 of 4 shards\)"):
        GradientStore.open(tmp_path / "s")
    store = GradientStore.open(tmp_path / "s", partial=True)
    assert store.shards == [(1, 30, 60), (3, 90, 100)]
    np.testing.assert_array_equal(store.block(30, 60), arrays.rows[30:60])
    with pytest.raises(StoreIncomplete, match=r"00000\.safetensors: not written yet"):
        store.block(0, 40)


def test_f8_parts(tmp_path, arrays, plan):
    owner = begun(tmp_path / "s", arrays, plan, shards=[1, 3])
    with StoreWriter.join(tmp_path / "s", 5) as part:
        part.write(0, arrays.rows[:30], arrays.side(0, 30))
        assert (tmp_path / "s/parts/5.lock").exists()
    assert json.loads((tmp_path / "s/parts/5.jsonl").read_bytes())["file"] == "shards/00000.safetensors"
    owner.close()
    with pytest.raises(StoreIncomplete):
        StoreWriter.resume(tmp_path / "s", plan=plan).finish()
    assert {line["file"] for line in journal(tmp_path / "s")} >= {f"shards/0000{n}.safetensors" for n in (0, 1, 3)}
    assert not (tmp_path / "s/parts").exists()


def test_f7_a_refusing_disk(tmp_path, arrays, plan, monkeypatch):
    writer = begun(tmp_path / "s", arrays, plan, shards=[0])
    writer._drain()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    writer.write(1, arrays.rows[30:60], arrays.side(30, 60))
    with pytest.raises(StoreUnwritable, match=r"No space left on device.*then resume"):
        writer.close()
    monkeypatch.undo()
    assert not list((tmp_path / "s").rglob("*.tmp"))
    writer = StoreWriter.resume(tmp_path / "s", plan=plan)
    assert [shard for shard, _, _ in writer.pending] == [1, 2, 3]
    writer.close()


def test_g1_opening_touches_no_shard(store):
    for file in store.path.glob("*/*"):
        file.unlink()
    assert len(GradientStore.open(store.path).shards) == 4


def test_g2_the_first_touch_verifies(store, arrays):
    path = store.path / "shards/00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    opened = GradientStore.open(store.path)
    np.testing.assert_array_equal(opened.block(0, 30), arrays.rows[:30])  # another shard's damage is not in the way
    with pytest.raises(StoreCorrupt, match=r"00001\.safetensors: checksum .* the journal says"):
        opened.block(29, 31)


def test_g3_verify_reports_each_piece(store):
    (store.path / "shards/00000.safetensors").unlink()
    (store.path / "shards/extra").write_text("")
    with open(store.path / "data/00002.jsonl", "r+b") as file:
        file.write(b"?")
    report = verify(store.path)
    assert not report.ok
    assert [re.search(r"(shards|data)/[\w.]+", problem)[0] for problem in report.problems] == [
        "shards/00000.safetensors",
        "data/00002.jsonl",
        "shards/extra",
    ]
    assert json.loads(json.dumps(report.to_dict()))["ok"] is False


def test_h1_merging(tmp_path, make, write, folder_bytes):
    arrays = make(50, 6)
    whole = write(tmp_path / "whole", arrays, rows_per_shard=20, dtype="int4")
    halves = []
    for name, rows in (("one", slice(0, 25)), ("two", slice(25, 50))):
        fields = (arrays.rows, arrays.loss, arrays.tokens, arrays.sq_norm, arrays.texts)
        half = type(arrays)(*(field[rows] for field in fields))
        halves.append(write(tmp_path / name, half, rows_per_shard=20, dtype="int4"))
    merge(halves, tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(whole)


def test_h2_finished_files_are_never_changed(store, arrays, plan):
    linked = merge([store.path], store.path.parent / "linked").path
    before = (linked / "shards/00001.safetensors").read_bytes()
    (store.path / "data/00001.jsonl").unlink()
    os.remove(store.path / "shards/00001.safetensors")
    repair(store.path)
    with StoreWriter.resume(store.path, plan=plan) as writer:
        writer.write_data(arrays.texts)
        writer.write(1, arrays.rows[30:60] * 2, arrays.side(30, 60))
    assert (linked / "shards/00001.safetensors").read_bytes() == before
    assert verify(linked).ok


def test_h3_repair(store):
    with open(store.path / "shards/00002.safetensors", "r+b") as file:
        file.seek(9000)
        file.write(b"!")
    assert repair(store.path).lost == (("shards/00002.safetensors", 60, 90),)
    assert not GradientStore.open(store.path, partial=True).complete
    assert not (store.path / "shards/00002.safetensors").exists()


def test_b13_documents(tmp_path, make, plan, store):
    assert manifest(store)["documents"] is None
    with StoreWriter.create(
        tmp_path / "t", rows=3, columns={}, plan=plan, side_columns=(), offsets=np.array([0, 2, 2, 3])
    ) as writer:
        writer.write(0, np.empty((3, 0)))
        writer.write_data({"d": d} for d in range(3))
    assert json.loads((tmp_path / "t/manifest.json").read_bytes())["documents"] == 3


def test_e4_offsets_of_documents(tmp_path, plan):
    offsets = np.array([0, 0, 2, 2, 5, 5])
    with StoreWriter.create(
        tmp_path / "t", rows=5, columns={}, plan=plan, side_columns=(), offsets=offsets, rows_per_shard=2
    ) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, np.empty((stop - start, 0)))
        writer.write_data({"d": d} for d in range(5))
    np.testing.assert_array_equal(np.load(tmp_path / "t/offsets.npy"), offsets)
    assert "offsets.npy" in {line["file"] for line in journal(tmp_path / "t")}
    store = GradientStore.open(tmp_path / "t")
    assert [store.data(row)["d"] for row in range(5)] == [1, 1, 3, 3, 3]
