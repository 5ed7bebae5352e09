"""The store as a Hugging Face dataset: what went in, the gradients beside it, and the same after it has travelled."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from datasets import load_dataset, load_from_disk

from attribute import load_gradient_dataset
from attribute._errors import RunError
from gradstore import GradientStore, StoreWriter

COLUMNS = {"h.0.attn": 3, "h.0.mlp": 5}
RECORDS = [{"text": f"document {i}", "label": i % 3 or None, "turns": [{"role": "user", "n": i}]} for i in range(23)]
ROWS = np.random.default_rng(0).standard_normal((23, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("attribute.dataset_view._BYTES", 4 * 8 * 5)  # five rows at a time


def write(path, records=RECORDS, rows=ROWS, dtype="fp32", **options):
    with StoreWriter.create(
        path, rows=len(rows), columns=COLUMNS, plan={}, dtype=dtype, side_columns=("loss", "tokens"), **options
    ) as writer:
        if options.get("data", True):
            writer.write_data(records)
        for shard, start, stop in writer.pending:
            writer.write(shard, rows[start:stop], {"loss": rows[start:stop, 0], "tokens": np.arange(start, stop)})
    return GradientStore.open(path)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int4"])
def test_original_columns_and_gradients(tmp_path, dtype):
    store = write(tmp_path / "s", dtype=dtype, rows_per_shard=7)
    dataset = load_gradient_dataset(tmp_path / "s")
    assert dataset.column_names == ["text", "label", "turns", "loss", "tokens", "gradients"]
    assert dataset.remove_columns(["loss", "tokens", "gradients"]).to_list() == RECORDS
    arrays = dataset.with_format("numpy")
    np.testing.assert_array_equal(np.stack(list(arrays["gradients"])), store.block(0, 23))
    np.testing.assert_array_equal(np.array(arrays["loss"]), ROWS[:, 0])
    assert arrays[5]["gradients"].dtype == np.float32


def test_it_travels(tmp_path):
    """What ``push_to_hub`` uploads is Parquet, what ``save_to_disk`` writes is Arrow: neither needs us to be read."""
    write(tmp_path / "s")
    dataset = load_gradient_dataset(tmp_path / "s", structured=True)
    dataset.to_parquet(tmp_path / "uploaded.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    uploaded = load_dataset(
        "parquet", data_files=str(tmp_path / "uploaded.parquet"), split="train", cache_dir=str(tmp_path / "other")
    )
    for travelled in (uploaded, load_from_disk(tmp_path / "saved")):
        assert travelled.features == dataset.features
        assert travelled.to_list() == dataset.to_list()
    shuffled = uploaded.select([7, 2, 5])
    assert shuffled["gradients"] == [dataset[i]["gradients"] for i in (7, 2, 5)]


def test_modules_by_pattern_and_by_name(tmp_path):
    write(tmp_path / "s")
    part = load_gradient_dataset(tmp_path / "s", modules="*mlp").with_format("numpy")
    np.testing.assert_array_equal(part[9]["gradients"], ROWS[9, 3:])
    named = load_gradient_dataset(tmp_path / "s", structured=True).with_format("numpy")[9]["gradients"]
    assert list(named) == list(COLUMNS)
    np.testing.assert_array_equal(named["h.0.attn"], ROWS[9, :3])


def test_it_is_made_once_and_never_stale(tmp_path):
    write(tmp_path / "s")
    files = []
    for _ in range(2):
        load_gradient_dataset(tmp_path / "s")
        files.append({each.stat().st_ino for each in (tmp_path / "cache").rglob("*.arrow")})
    assert files[0] == files[1]
    write(tmp_path / "t", rows=ROWS + 1)
    np.testing.assert_array_equal(load_gradient_dataset(tmp_path / "t")[2]["gradients"], ROWS[2] + 1)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_row_per_token_is_a_record_per_document(tmp_path):
    offsets = np.array([0, 4, 4, 9, 23])
    write(tmp_path / "s", records=RECORDS[:4], offsets=offsets)
    dataset = load_gradient_dataset(tmp_path / "s")
    assert dataset["text"] == [record["text"] for record in RECORDS[:4]]
    for number, (start, stop) in enumerate(pairwise(offsets)):
        assert dataset[number]["gradients"] == ROWS[start:stop].tolist()
        assert dataset[number]["tokens"] == list(range(start, stop))


def test_a_column_of_the_records_keeps_its_name(tmp_path):
    write(tmp_path / "s", records=[{"loss": "mine"}] * 23)
    assert load_gradient_dataset(tmp_path / "s")[0]["loss"] == "mine"
    write(tmp_path / "t", records=[{"gradients": "mine"}] * 23)
    with pytest.raises(RunError, match="column 'gradients' of their own"):
        load_gradient_dataset(tmp_path / "t")


def test_refusals(tmp_path):
    write(tmp_path / "s", data=False)
    with pytest.raises(RunError, match="without its records"):
        load_gradient_dataset(tmp_path / "s")
    write(tmp_path / "t", records=[], rows=ROWS[:0])
    with pytest.raises(RunError, match="empty"):
        load_gradient_dataset(tmp_path / "t")
