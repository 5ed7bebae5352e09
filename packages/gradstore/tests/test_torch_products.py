"""Torch only filters: whatever it rounds, the hits and their scores are those of NumPy, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from gradstore import GradientStore, search
from gradstore._encodings import DTYPES
from gradstore._search import _Scorer

COLUMNS = {"a": 5, "b": 16, "c": 9}


@pytest.fixture
def torch(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is used where it is, and not needed")
    monkeypatch.setattr("gradstore._search.loaded_torch", lambda: torch)
    monkeypatch.setattr("gradstore._search.has_int8_gemm", lambda _: True)  # slow loops where the CPU has none
    return torch


def make_store(path, make, write, dtype):
    arrays = make(150, 30)
    arrays.rows[:, 5:21] *= 1e-4  # modules of very different size
    arrays.rows[17] = 0
    arrays.rows[40] = arrays.rows[90]
    arrays.rows[60] *= np.float32(1e-20)
    return GradientStore.open(write(path, arrays, columns=COLUMNS, rows_per_shard=64, dtype=dtype))


def make_queries():
    queries = np.random.default_rng(3).standard_t(2, (5, 30)).astype(np.float32)  # long tails: hard to quantise
    queries[2] = 0
    queries[4, 5:21] = 0
    return queries


def by_numpy(monkeypatch, *args, **options):
    with monkeypatch.context() as patch:
        patch.setattr("gradstore._search.loaded_torch", lambda: None)
        return search(*args, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["dot", "cos"])
def test_the_same_hits_and_scores_as_without_torch(torch, tmp_path, make, write, monkeypatch, dtype, metric):
    store, queries = make_store(tmp_path / "s", make, write, dtype), make_queries()
    for k in (1, 7, 150):
        for modules in (None, ["c", "a"]):
            for bits in {None, *(b for b in (1, 2, 4) if b < (store.layout.bits or 0))}:
                options = {"metric": metric, "modules": modules, "bits": bits}
                found, expected = (
                    search(store, queries, k, **options),
                    by_numpy(monkeypatch, store, queries, k, **options),
                )
                for name in ("top_rows", "top_scores", "bottom_rows", "bottom_scores"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_right_to_within_what_they_say(torch, tmp_path, make, write, dtype):
    store, queries = make_store(tmp_path / "s", make, write, dtype), make_queries()
    scorer = _Scorer(store, queries, "dot", None)
    assert scorer._products.__class__.__name__ in ("FloatProducts", "PlaneProducts")
    rows = store.block(0, 150).astype(np.float64)
    exact = queries.astype(np.float64) @ rows.T
    for start, block in scorer.sweep(None, None):
        part = slice(start, start + block.scores.shape[1])
        assert (np.abs(block.scores - exact[:, part]) <= block.errors).all()
    bound = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    assert scorer._lost.max() <= 2e-3 * np.linalg.norm(queries, axis=1).max()  # the filter is worth having
    assert bound.max() > 0


def test_wide_modules_do_not_overflow(torch, tmp_path, plan, make, write, monkeypatch):
    """Products of more than 2^17 extreme codes leave int32: they are summed in parts."""
    width = 2**17 + 24
    arrays = make(3, width)
    arrays.rows[:] = [[1], [-1], [0.5]]
    store = GradientStore.open(write(tmp_path / "s", arrays, columns={"a": width}, dtype="int8"))
    queries = np.ones((1, width), np.float32)
    found, expected = search(store, queries, 3), by_numpy(monkeypatch, store, queries, 3)
    np.testing.assert_array_equal(found.top_rows, [[0, 2, 1]])
    np.testing.assert_array_equal(found.top_scores, expected.top_scores)
    scorer = _Scorer(store, queries, "dot", None)
    ((_, block),) = scorer.sweep(None, None)
    np.testing.assert_allclose(block.scores[0], found.top_scores[0][[0, 2, 1]], rtol=1e-4)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_float32_precision_is_not_used(precision):
    torch = pytest.importorskip("torch")
    from gradstore._torch_products import loaded_torch

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert loaded_torch() is None
        torch.set_float32_matmul_precision("highest")
        assert loaded_torch() is torch
    finally:
        torch.set_float32_matmul_precision(before)


def test_torch_gets_its_threads_back(store):
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        search(store, np.ones((1, 12), np.float32), 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_search_does_not_import_torch(store):
    code = (
        "import sys, numpy as np; from gradstore import GradientStore, search;"
        "search(GradientStore.open(sys.argv[1]), np.ones((1, 12), np.float32), 3); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, store.path], check=True)


def test_torch_rounds_to_half_precision_as_numpy_does():
    pytest.importorskip("torch")
    from gradstore._encodings import _to_float16

    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        between = (halves[1:] + halves[:-1]) / 2  # ties
        values = np.concatenate([bits.view(np.float32), halves, between])
        values = values[np.isfinite(values)].reshape(1, -1)
        np.testing.assert_array_equal(_to_float16(values).view(np.uint16), values.astype("<f2").view(np.uint16))
