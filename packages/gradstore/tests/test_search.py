"""Search against the ten-line reference: float64 products, a stable sort."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from gradstore import GradientStore, InvalidInput, RowTransform, StoreWriter, scores, search


def reference(store: GradientStore, queries, k, metric="dot", modules=None):
    names = list(store.columns) if modules is None else modules
    rows = store.block(0, store.rows, names).astype(np.float64)
    picked = np.concatenate([queries[:, store.columns[name]] for name in names], axis=1).astype(np.float64)
    values = np.stack([(rows * query).sum(1) for query in picked]) if len(picked) else np.empty((0, store.rows))
    if metric == "cos":
        lengths = np.sqrt((picked**2).sum(1))[:, None] * np.sqrt((rows**2).sum(1))
        values = np.where(lengths > 0, values / np.where(lengths > 0, lengths, 1), 0)
    values = values.astype(np.float32) + 0
    top, bottom = (np.argsort(sign * values, axis=1, kind="stable")[:, :k] for sign in (-1, 1))
    return top, np.take_along_axis(values, top, 1), bottom, np.take_along_axis(values, bottom, 1)


def assert_same(result, expected):
    top, top_scores, bottom, bottom_scores = expected
    np.testing.assert_array_equal(result.top_rows, top)
    np.testing.assert_array_equal(result.bottom_rows, bottom)
    np.testing.assert_allclose(result.top_scores, top_scores, rtol=2e-7, atol=0)
    np.testing.assert_allclose(result.bottom_scores, bottom_scores, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4", "int2", "int1"])
@pytest.mark.parametrize("metric", ["dot", "cos"])
@pytest.mark.parametrize("modules", [None, ["b"], ["c", "a"]])
@pytest.mark.parametrize("seed", range(2))
def test_search_equals_the_reference(tmp_path, make, write, dtype, metric, modules, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 300))
    arrays = make(count, 20, seed)
    arrays.rows *= 10.0 ** rng.integers(-12, 4, (count, 1))  # gradients differ by orders of magnitude
    arrays.rows[rng.random(count) < 0.1] = 0
    arrays.rows[rng.integers(0, count, count // 3)] = arrays.rows[rng.integers(0, count)]  # planted duplicates tie
    path = write(
        tmp_path / "s", arrays, columns={"a": 5, "b": 8, "c": 7}, dtype=dtype, rows_per_shard=int(rng.integers(1, 90))
    )
    store = GradientStore.open(path)
    queries = rng.standard_normal((int(rng.integers(0, 7)), 20)).astype(np.float32)
    queries[rng.random(len(queries)) < 0.2] = 0
    for k in (1, 5, count + 3):
        expected = reference(store, queries, k, metric, modules)
        for block_rows, threads in ((None, None), (7, 3), (64, 1)):
            got = search(store, queries, k, metric=metric, modules=modules, block_rows=block_rows, threads=threads)
            assert_same(got, expected)
    full = scores(store, queries, metric=metric, modules=modules)
    top, values, _, _ = reference(store, queries, count, metric, modules)
    unsorted = np.empty_like(values)
    np.put_along_axis(unsorted, top, values, 1)
    bound = np.abs(unsorted).max(initial=0) * 1e-6 if metric == "dot" else 3e-6
    np.testing.assert_allclose(full, unsorted, rtol=0, atol=bound)


def test_integer_scores_tie_in_row_order(tmp_path, make, write):
    arrays = make(500, 3)
    arrays.rows = np.random.default_rng(1).integers(-1, 2, (500, 3)).astype(np.float32)  # 7 distinct scores at most
    store = GradientStore.open(write(tmp_path / "s", arrays, rows_per_shard=77))
    queries = np.ones((2, 3), np.float32)
    for block_rows in (None, 10, 13):
        assert_same(search(store, queries, 40, block_rows=block_rows), reference(store, queries, 40))


def test_equal_rows_tie_wherever_they_stand(tmp_path, make, write):
    arrays = make(999, 257)
    arrays.rows[[3, 500, 501, 997, 998]] = arrays.rows[3]
    store = GradientStore.open(write(tmp_path / "s", arrays, rows_per_shard=400))
    for block_rows in (None, 17, 500):
        result = search(store, arrays.rows[3:4], 6, metric="cos", block_rows=block_rows)
        assert result.top_rows[0, :5].tolist() == [3, 500, 501, 997, 998]
        assert result.top_scores[0, :5].tolist() == [1.0] * 5


def test_a_million_equal_zeros_are_ordered_by_row(tmp_path, make, write):
    arrays = make(3000, 2)
    arrays.rows[:] = 0
    store = GradientStore.open(write(tmp_path / "s", arrays))
    result = search(store, np.zeros((1, 2), np.float32), 4, metric="cos", block_rows=100)
    assert result.top_rows.tolist() == result.bottom_rows.tolist() == [[0, 1, 2, 3]]
    assert result.top_scores.tolist() == [[0.0] * 4]


def test_extreme_magnitudes_keep_their_cosine(tmp_path, make, write):
    arrays = make(60, 8)
    arrays.rows *= np.logspace(-40, 36, 60, dtype=np.float64)[:, None].astype(np.float32)
    arrays.sq_norm[:] = 0
    for dtype in ("fp32", "bf16"):
        store = GradientStore.open(write(tmp_path / dtype, arrays, dtype=dtype))
        queries = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
        assert_same(search(store, queries, 9, metric="cos"), reference(store, queries, 9, "cos"))


def test_fp16_survives_gradients_that_half_precision_can_not_hold(tmp_path, make, write):
    arrays = make(50, 8)
    arrays.rows *= np.logspace(-30, 30, 50, dtype=np.float64)[:, None].astype(np.float32)
    arrays.sq_norm[:] = 0
    store = GradientStore.open(write(tmp_path / "s", arrays, dtype="fp16"))
    np.testing.assert_allclose(store.block(0, 50), arrays.rows, rtol=2**-11, atol=0)


def test_results_are_frozen(store):
    result = search(store, np.ones((1, 12), np.float32), 2)
    with pytest.raises(ValueError, match="read-only"):
        result.top_scores[0, 0] = 9


def test_an_empty_store_has_no_hits(tmp_path, make, write):
    store = GradientStore.open(write(tmp_path / "s", make(0, 4)))
    result = search(store, np.ones((2, 4), np.float32), 5)
    assert result.top_rows.shape == result.bottom_scores.shape == (2, 0)
    assert scores(store, np.ones((2, 4), np.float32)).shape == (2, 0)


def test_rows_without_floats_score_zero(tmp_path, make, write):
    store = GradientStore.open(write(tmp_path / "s", make(5, 0), columns={}))
    result = search(store, np.ones((1, 0), np.float32), 2, metric="cos")
    assert result.top_rows.tolist() == [[0, 1]]
    assert result.top_scores.tolist() == [[0.0, 0.0]]


def test_a_partial_store_is_searched_as_far_as_it_goes(tmp_path, arrays, plan):
    writer = StoreWriter.create(tmp_path / "s", rows=100, columns={"a": 12}, plan=plan, rows_per_shard=30)
    writer.write(2, arrays.rows[60:90], arrays.side(60, 90))
    writer.close()
    store = GradientStore.open(tmp_path / "s", partial=True)
    result = search(store, arrays.rows[70:71], 50)
    assert sorted(result.top_rows[0]) == list(range(60, 90))
    full = scores(store, arrays.rows[70:71])
    assert np.isnan(full[0, :60]).all()
    assert np.isfinite(full[0, 60:90]).all()


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (np.ones((1, 5)), {}, r"shape \(1, 5\); expected \[q, 12\]"),
        (np.ones(12), {}, r"expected \[q, 12\]"),
        (np.array([[1.0] * 12, [np.nan] * 12]), {}, "Query 1 holds values that are not finite"),
        (np.full((1, 12), 1e300), {}, "Query 0 holds values that are not finite"),
        (np.full((1, 12), 3e38), {}, "overflow float32"),
        (np.ones((1, 12)), {"metric": "l2"}, "Unknown metric 'l2'"),
        (np.ones((1, 12)), {"modules": ["A"]}, "No module 'A'"),
        (np.ones((1, 12)), {"modules": []}, "modules must be"),
        (np.ones((1, 12)), {"modules": "a"}, "modules must be"),
        (np.ones((1, 12)), {"k": -1}, "k is -1"),
        (np.ones((1, 12)), {"block_rows": 0}, "block_rows is 0"),
        (np.ones((1, 12)), {"threads": 0}, "threads is 0"),
        (np.ones((1, 12)), {"bits": 2}, "bits is 2, but the store holds fp32: leave it out"),
        (np.ones((1, 12)), {"candidates": 9}, "candidates is 9; it goes with `bits`"),
    ],
)
def test_bad_queries_are_refused(store, queries, options, message):
    with pytest.raises(InvalidInput, match=message):
        search(store, queries, **{"k": 3, **options})


@pytest.mark.parametrize("metric", ["dot", "cos"])
@pytest.mark.parametrize("modules", [None, ["b"]])
def test_a_coarse_scan_ranked_again_with_all_planes(tmp_path, make, write, metric, modules):
    arrays = make(400, 20)
    store = GradientStore.open(
        write(tmp_path / "s", arrays, columns={"a": 11, "b": 9}, dtype="int4", rows_per_shard=150)
    )
    queries = np.random.default_rng(1).standard_normal((3, 20)).astype(np.float32)
    options = {"metric": metric, "modules": modules}
    everything = search(store, queries, 7, **options, bits=1, candidates=400)
    assert_same(everything, reference(store, queries, 7, metric, modules))
    coarse = search(store, queries, 30, **options, bits=2)
    ranked = search(store, queries, 7, **options, bits=2, candidates=30)
    full = scores(store, queries, **options)
    for query in range(3):
        found = coarse.top_rows[query]
        best = found[np.lexsort((found, -full[query, found]))][:7]
        assert ranked.top_rows[query].tolist() == best.tolist()
    assert (coarse.top_rows[:, :7] != ranked.top_rows).any()


def test_bits_must_be_fewer_than_the_store_has(tmp_path, make, write):
    store = GradientStore.open(write(tmp_path / "s", make(9, 8), dtype="int4"))
    search(store, np.ones((1, 8), np.float32), 1, bits=4)
    for bits in (0, 3, 8):
        with pytest.raises(InvalidInput, match=rf"bits is {bits}, but the store holds int4: one of \[1, 2\]"):
            search(store, np.ones((1, 8), np.float32), 1, bits=bits)


def test_blas_gets_its_threads_back(store):
    def limits():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    before = limits()
    assert before
    search(store, np.ones((1, 12), np.float32), 1)
    with pytest.raises(InvalidInput):
        search(store, np.full((1, 12), 3e38, np.float32), 1)
    with ThreadPoolExecutor(4) as pool:  # overlapping searches share the limit
        results = list(pool.map(lambda _: search(store, np.ones((1, 12), np.float32), 5), range(20)))
    assert all((result.top_rows == results[0].top_rows).all() for result in results)
    assert limits() == before


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int2"])
@pytest.mark.parametrize("metric", ["dot", "cos"])
def test_near_ties_that_a_float32_sum_can_not_tell_apart(tmp_path, make, write, dtype, metric):
    arrays = make(400, 4096)
    rng = np.random.default_rng(3)
    arrays.rows = arrays.rows[:1] + np.where(rng.random((400, 4096)) < 0.002, 1e-4, 0).astype(np.float32)
    store = GradientStore.open(
        write(tmp_path / "s", arrays, columns={"a": 96, "b": 4000}, dtype=dtype, rows_per_shard=150)
    )
    queries = np.concatenate([arrays.rows[:1], rng.standard_normal((4, 4096)).astype(np.float32)])
    for block_rows in (None, 33):
        assert_same(
            search(store, queries, 25, metric=metric, block_rows=block_rows), reference(store, queries, 25, metric)
        )


@pytest.mark.parametrize("metric", ["dot", "cos"])
@pytest.mark.parametrize("modules", [None, ["b"]])
@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_transform_comes_before_the_normalisation_on_both_sides(tmp_path, make, write, metric, modules, dtype):
    arrays = make(200, 12)
    arrays.rows[60] = arrays.rows[130]
    store = GradientStore.open(write(tmp_path / "s", arrays, columns={"a": 4, "b": 8}, rows_per_shard=64, dtype=dtype))
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((3, 12)).astype(np.float32)
    width = 12 if modules is None else 8
    root = rng.standard_normal((width, width)).astype(np.float32)
    transform = RowTransform("a root", lambda rows: rows @ root)
    rows = store.block(0, 200, modules).astype(np.float64) @ root
    asked = (queries if modules is None else queries[:, 4:]).astype(np.float64) @ root
    exact = asked @ rows.T
    if metric == "cos":
        exact /= np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    options = {"metric": metric, "modules": modules, "transform": transform}
    found = search(store, queries, 5, **options)
    np.testing.assert_array_equal(found.top_rows, np.argsort(-exact, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(found.bottom_scores, np.sort(exact, axis=1)[:, :5], rtol=1e-4)
    np.testing.assert_allclose(scores(store, queries, **options), exact, rtol=1e-3, atol=1e-3)
    other = search(store, queries, 5, block_rows=17, threads=1, **options)
    np.testing.assert_array_equal(found.top_scores, other.top_scores)


@pytest.mark.parametrize(
    ("apply", "message"),
    [(lambda rows: rows[:1], "expected a row each"), (lambda rows: rows * np.nan, "not finite")],
)
def test_a_bad_transform_is_refused(store, apply, message):
    with pytest.raises(InvalidInput, match=message):
        search(store, np.ones((2, 12), np.float32), 3, transform=RowTransform("bad", apply))
