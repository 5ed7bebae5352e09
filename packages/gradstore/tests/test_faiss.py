"""FAISS beside the exact search: equal where the index is exact, never stale, never a wrong row."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from gradstore import (
    FaissConfig,
    FaissIndex,
    GradientStore,
    GradStoreError,
    InvalidInput,
    RowTransform,
    StoreIncomplete,
    StoreWriter,
    search,
)

COLUMNS = {"a": 8, "b": 24}


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss", reason="needs the extra: gradstore[faiss]")


@pytest.fixture
def rows(tmp_path, make, write):
    arrays = make(300, 32)
    arrays.rows[40] = 0
    return GradientStore.open(write(tmp_path / "s", arrays, columns=COLUMNS, rows_per_shard=90))


@pytest.fixture
def queries():
    return np.random.default_rng(5).standard_normal((4, 32)).astype(np.float32)


def assert_same(found, exact):
    for side in ("top", "bottom"):
        np.testing.assert_array_equal(getattr(found, f"{side}_rows"), getattr(exact, f"{side}_rows"))
        np.testing.assert_allclose(
            getattr(found, f"{side}_scores"), getattr(exact, f"{side}_scores"), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("metric", ["dot", "cos"])
@pytest.mark.parametrize("modules", [None, ["b"]])
@pytest.mark.parametrize("options", [{}, {"num_shards": 7}, {"mmap_index": True, "batch_size": 11}])
def test_a_flat_index_is_exact(faiss, rows, queries, metric, modules, options):
    index = FaissIndex.build(rows, FaissConfig("Flat", **options), metric=metric, modules=modules)
    for k in (1, 10, 300, 999):
        assert_same(index.search(queries, k), search(rows, queries, k, metric=metric, modules=modules))


def test_an_inverted_file_that_visits_every_cell_is_exact(faiss, rows, queries):
    index = FaissIndex.build(rows, FaissConfig("IVF4,Flat", nprobe=4, max_train_examples=200))
    assert_same(index.search(queries, 10), search(rows, queries, 10))


def test_cells_not_visited_leave_rows_out_and_say_so(faiss, rows, queries):
    result = FaissIndex.build(rows, FaissConfig("IVF4,Flat", nprobe=1)).search(queries, 300)
    assert (result.top_rows == -1).any()
    assert (np.isnan(result.top_scores) == (result.top_rows == -1)).all()
    found = result.top_rows[0][result.top_rows[0] >= 0]
    assert len(set(found)) == len(found)


def test_a_half_precision_index_is_close(faiss, rows, queries):
    result = FaissIndex.build(rows, FaissConfig("SQfp16"), metric="cos").search(queries, 1)
    np.testing.assert_allclose(result.top_scores, search(rows, queries, 1, metric="cos").top_scores, atol=2e-3)


def test_a_transform_comes_before_the_normalisation(faiss, rows, queries):
    factor = np.linspace(0.1, 3, 32, dtype=np.float32)
    index = FaissIndex.build(rows, metric="cos", transform=RowTransform("diagonal", lambda x: x * factor))
    left, right = queries * factor, rows.block(0, 300) * factor
    norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    cosines = np.divide(left @ right.T, norms, out=np.zeros((4, 300), np.float32), where=norms > 0)
    result = index.search(queries, 5)
    np.testing.assert_array_equal(result.top_rows, np.argsort(-cosines, axis=1)[:, :5])
    np.testing.assert_allclose(result.top_scores, -np.sort(-cosines, axis=1)[:, :5], atol=1e-5)


def test_an_index_is_found_again_only_if_nothing_has_changed(faiss, rows, tmp_path, make, write):
    build = FaissIndex.build
    first = build(rows).path
    before = (first / "0.faiss").stat().st_ino
    assert (
        build(rows, FaissConfig(nprobe=3, batch_size=7, mmap_index=True)).path == first
    )  # these don't shape the index
    assert (first / "0.faiss").stat().st_ino == before
    other = make(300, 32, seed=1)
    same_plan = GradientStore.open(write(tmp_path / "t" / "s", other, columns=COLUMNS, rows_per_shard=90))
    others = [
        build(rows, metric="cos"),
        build(rows, modules=["b"]),
        build(rows, modules=["b", "a"]),
        build(rows, FaissConfig("SQfp16")),
        build(rows, FaissConfig(num_shards=2)),
        build(rows, transform=RowTransform("h-1", lambda x: x)),
        build(rows, transform=RowTransform("h-2", lambda x: x)),
        build(same_plan, folder=first.parent),
    ]
    assert len({first, *(index.path for index in others)}) == 9
    assert json.loads((first / "index.json").read_text())["index_factory"] == "Flat"


def test_a_killed_build_is_not_used(faiss, rows, queries):
    path = FaissIndex.build(rows).path
    (path / "index.json").unlink()
    (path / "0.faiss").write_bytes(b"half")
    assert_same(FaissIndex.build(rows).search(queries, 3), search(rows, queries, 3))


def test_zero_queries_and_zero_rows(faiss, rows, tmp_path, make, write):
    assert FaissIndex.build(rows).search(np.empty((0, 32), np.float32), 5).top_rows.shape == (0, 5)
    empty = GradientStore.open(write(tmp_path / "e", make(0, 32), columns=COLUMNS))
    assert FaissIndex.build(empty).search(np.ones((2, 32), np.float32), 5).top_rows.shape == (2, 0)
    zero = FaissIndex.build(rows, metric="cos").search(np.zeros((1, 32), np.float32), 2)
    assert zero.top_scores.tolist() == [[0, 0]]


def test_bad_settings_are_refused(faiss, rows, queries, tmp_path, plan):
    with pytest.raises(InvalidInput, match="FAISS refuses 'Flatt'"):
        FaissIndex.build(rows, FaissConfig("Flatt"))
    with pytest.raises(InvalidInput, match="FAISS refuses 'IVF4096,Flat' for 300 rows"):
        FaissIndex.build(rows, FaissConfig("IVF4096,Flat"))
    with pytest.raises(InvalidInput, match="num_shards"):
        FaissIndex.build(rows, FaissConfig(num_shards=0))
    with pytest.raises(InvalidInput, match="Unknown metric"):
        FaissIndex.build(rows, metric="l2")
    with pytest.raises(InvalidInput, match=r"expected \[q, 32\]"):
        FaissIndex.build(rows).search(queries[:, :3], 1)
    writer = StoreWriter.create(tmp_path / "begun", rows=1, columns={"a": 1}, plan=plan)
    writer.close()
    with pytest.raises(StoreIncomplete):
        FaissIndex.build(GradientStore.open(tmp_path / "begun", partial=True))


def test_without_the_extra_the_error_names_the_command(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(GradStoreError, match=r"uv pip install 'gradstore\[faiss\]'"):
        FaissIndex.build(rows)


def test_importing_gradstore_imports_no_faiss():
    code = "import sys, gradstore; sys.exit('faiss' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
