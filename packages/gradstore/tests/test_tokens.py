"""Stores with a row per token: hits name a document and a place in it, empty documents included."""

from __future__ import annotations

import numpy as np
import pytest

from gradstore import GradientStore, InvalidInput, StoreCorrupt, StoreWriter, info, merge, repair, search, verify


def write_tokens(path, lengths, rows, plan, first=0, **options):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    options = {"rows_per_shard": 7, "side_columns": (), **options}
    with StoreWriter.create(path, rows=len(rows), columns={"a": 4}, plan=plan, offsets=offsets, **options) as writer:
        writer.write_data({"document": first + d} for d in range(len(lengths)))
        for shard, start, stop in writer.pending:
            writer.write(shard, rows[start:stop])
    return path


@pytest.mark.parametrize("seed", range(5))
def test_every_row_knows_its_document_and_place(tmp_path, plan, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, rng.integers(1, 60))
    rows = rng.standard_normal((lengths.sum(), 4)).astype(np.float32)
    store = GradientStore.open(write_tokens(tmp_path / "s", lengths, rows, plan))
    expected = [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    assert [store.document(row) for row in range(len(rows))] == expected
    assert [store.data(row)["document"] for row in range(len(rows))] == [d for d, _ in expected]
    assert [store.item(d)["document"] for d in range(len(lengths))] == list(range(len(lengths)))
    assert info(store.path).documents == len(lengths)
    assert verify(store.path).ok
    if len(rows):
        hit = search(store, rows[-1:], 1, metric="cos").top_rows[0, 0]
        assert store.document(hit) == expected[-1]


def test_without_tokens_a_row_is_its_document(store):
    assert store.offsets is None
    assert store.document(42) == (42, 0)
    assert store.item(42) == store.data(42)


def test_only_empty_documents(tmp_path, plan):
    store = GradientStore.open(write_tokens(tmp_path / "s", [0, 0, 0], np.empty((0, 4), np.float32), plan))
    assert len(store) == 0
    assert store.item(2) == {"document": 2}
    assert verify(store.path).ok


@pytest.mark.parametrize("cut", [0, 3, 11, 20])
def test_merged_token_stores_are_the_whole(tmp_path, plan, folder_bytes, cut):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, 20)
    rows = rng.standard_normal((lengths.sum(), 4)).astype(np.float32)
    whole = write_tokens(tmp_path / "whole", lengths, rows, plan)
    edge = lengths[:cut].sum()
    one = write_tokens(tmp_path / "one", lengths[:cut], rows[:edge], plan)
    two = write_tokens(tmp_path / "two", lengths[cut:], rows[edge:], plan, first=cut)
    merge([one, two], tmp_path / "merged")
    assert folder_bytes(tmp_path / "merged") == folder_bytes(whole)


def test_token_and_document_stores_do_not_merge(tmp_path, plan):
    one = write_tokens(tmp_path / "one", [2], np.ones((2, 4), np.float32), plan)
    two = tmp_path / "two"
    with StoreWriter.create(two, rows=1, columns={"a": 4}, plan=plan, side_columns=()) as writer:
        writer.write(0, np.ones((1, 4)))
        writer.write_data([{}])
    for pair in ([one, two], [two, one]):
        with pytest.raises(InvalidInput, match="one has a row per token"):
            merge(pair, tmp_path / "merged")


@pytest.mark.parametrize(
    "offsets",
    [np.array([0, 2]), np.array([1, 3]), np.array([0, 2, 1, 3]), np.array([]), np.array([0.0, 3.0]), np.zeros((2, 2))],
)
def test_offsets_that_are_none_are_refused(tmp_path, plan, offsets):
    with pytest.raises(InvalidInput, match="offsets must"):
        StoreWriter.create(tmp_path / "s", rows=3, columns={"a": 4}, plan=plan, offsets=offsets)
    assert not (tmp_path / "s").exists()


def test_one_dataset_row_per_document(tmp_path, plan):
    writer = StoreWriter.create(tmp_path / "s", rows=3, columns={"a": 4}, plan=plan, offsets=np.array([0, 3, 3]))
    with pytest.raises(InvalidInput, match="write_data got 3 or more rows; the store has 2 documents"):
        writer.write_data([{}, {}, {}])
    writer.close()


def test_damaged_offsets_are_found(tmp_path, plan):
    path = write_tokens(tmp_path / "s", [1, 2], np.ones((3, 4), np.float32), plan)
    file = path / "offsets.npy"
    raw = bytearray(file.read_bytes())
    raw[-8] ^= 1
    file.write_bytes(raw)
    assert "offsets.npy" in verify(path).problems[0]
    with pytest.raises(StoreCorrupt, match=r"offsets\.npy"):
        GradientStore.open(path).data(0)
    assert repair(path).lost == (("offsets.npy", 0, 3),)
    with pytest.raises(StoreCorrupt, match=r"offsets\.npy: missing or damaged; the store must be built anew"):
        StoreWriter.resume(path, plan=plan)


def test_hits_name_document_and_span(tmp_path, plan):
    with StoreWriter.create(
        tmp_path / "s", rows=9, columns={"a": 2}, plan=plan, side_columns=(), offsets=np.array([0, 4, 4, 9])
    ) as writer:
        writer.write_data({"text": f"document {d}"} for d in range(3))
        for shard, start, stop in writer.pending:
            writer.write(shard, np.arange(2 * start, 2 * stop).reshape(-1, 2))
    store = GradientStore.open(tmp_path / "s")
    assert store.spans([8, 1, 7, 3, 2, 4]) == [(2, 3, 5), (0, 1, 4), (2, 0, 1)]  # rows 3 and 4 are of two documents
    assert store.spans(search(store, np.ones((1, 2), np.float32), 3).top_rows[0]) == [(2, 2, 5)]
    assert store.spans([]) == []
