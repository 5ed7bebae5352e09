"""Quantised rows: what is lost, what a prefix reads, what odd widths and magnitudes do."""

from __future__ import annotations

import numpy as np
import pytest

from gradstore import GradientStore, InvalidInput, StoreWriter, verify
from gradstore._encodings import Layout
from gradstore._scratch import Scratch

BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}


def arrays_of(layout: Layout, rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: tensor.array for name, tensor in layout.encode(rows).items()}


@pytest.mark.parametrize(("dtype", "loss"), [("int1", 0.3634), ("int2", 0.1188), ("int4", 0.01154), ("int8", 2e-4)])
def test_gaussian_rows_lose_what_max_1960_says(dtype, loss):
    rows = np.random.default_rng(0).standard_normal((200, 4096)).astype(np.float32)
    layout = Layout(dtype, {"a": 4096})
    error = ((layout.decode(arrays_of(layout, rows)) - rows) ** 2).mean()
    if dtype == "int8":
        assert error < loss
    else:
        assert error == pytest.approx(loss, rel=0.01)


@pytest.mark.parametrize("dtype", BITS)
def test_each_row_and_module_has_its_own_scale(dtype):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 64)).astype(np.float32)
    factors = np.repeat(10.0 ** rng.integers(-12, 12, (50, 2)), 32, axis=1).astype(np.float32)
    layout = Layout(dtype, {"a": 32, "b": 32})
    plain, scaled = (layout.decode(arrays_of(layout, x)) for x in (rows, rows * factors))
    np.testing.assert_allclose(scaled, plain * factors, rtol=2e-5)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("widths", [(1,), (8,), (7, 9, 1), (0, 3), (16, 8), ()])
def test_modules_of_any_width_and_order(dtype, widths):
    columns = {f"m{i}": width for i, width in enumerate(widths)}
    rows = np.random.default_rng(0).standard_normal((5, sum(widths))).astype(np.float32)
    layout = Layout(dtype, columns)
    tensors = arrays_of(layout, rows)
    assert {name: array.shape[1:] for name, array in tensors.items()} == layout.shapes
    whole = layout.decode(tensors)
    assert whole.shape == rows.shape
    assert (np.sign(whole) == np.sign(rows)).all()
    for chosen in ([i] for i in range(len(widths))):
        np.testing.assert_array_equal(layout.decode(tensors, chosen), whole[:, layout.slices[chosen[0]]])
    if len(widths) > 1:
        swapped = np.concatenate([whole[:, layout.slices[1]], whole[:, layout.slices[0]]], axis=1)
        np.testing.assert_array_equal(layout.decode(tensors, [1, 0]), swapped)


@pytest.mark.parametrize("dtype", BITS)
def test_least_squares_no_scale_would_be_closer(dtype):
    rows = np.random.default_rng(0).standard_t(2, (30, 40)).astype(np.float32)
    layout = Layout(dtype, {"a": 40})
    tensors = arrays_of(layout, rows)
    best = ((layout.decode(tensors) - rows) ** 2).sum(1)
    for factor in (0.99, 1.01):
        worse = ((layout.decode({**tensors, "scale": tensors["scale"] * np.float32(factor)}) - rows) ** 2).sum(1)
        assert (worse > best).all()


@pytest.mark.parametrize("dtype", BITS)
def test_zero_and_extreme_rows(dtype):
    rows = np.zeros((4, 16), np.float32)
    rows[1] = 1e-44
    rows[2] = 1e37
    rows[3, 3] = -1
    layout = Layout(dtype, {"a": 16})
    tensors = arrays_of(layout, rows)
    decoded = layout.decode(tensors)
    assert (decoded[0] == 0).all()
    np.testing.assert_allclose(decoded[2], 1e37, rtol=1e-6)
    assert decoded[3, 3] < 0
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(tensors["norm"], np.linalg.norm(decoded.astype(np.float64), axis=1), rtol=1e-6)


@pytest.mark.parametrize("dtype", BITS)
def test_non_finite_rows_are_named(tmp_path, make, plan, dtype):
    arrays = make(20, 12)
    arrays.rows[13, 7] = np.nan
    writer = StoreWriter.create(tmp_path / "s", rows=20, columns={"a": 4, "b": 8}, plan=plan, dtype=dtype, data=False)
    writer.write(0, arrays.rows, arrays.side(0, 20))
    with pytest.raises(InvalidInput, match="Row 13, module 'b', entry 3: nan is not finite"):
        writer.close()


def test_fewer_bits_take_fewer_bytes(tmp_path, make, write):
    arrays = make(512, 1024)
    size = {}
    for dtype in ("fp32", "fp16", *BITS):
        path = write(tmp_path / dtype, arrays, dtype=dtype, rows_per_shard=512)
        size[dtype] = (path / "shards/00000.safetensors").stat().st_size
        assert verify(path).ok
        assert GradientStore.open(path).dtype == dtype
    for dtype, bits in BITS.items():
        assert size[dtype] == pytest.approx(512 * (1024 * bits / 8 + 4 + 4 + 12), abs=4096)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", *BITS])
def test_products_are_those_of_the_decoded_rows_whatever_the_scratch_held(dtype):
    rng = np.random.default_rng(0)
    layout, scratch = Layout(dtype, {"a": 24, "b": 5, "c": 0, "d": 11}), Scratch()
    for n in (50, 3, 0, 70):
        tensors = arrays_of(layout, rng.standard_normal((n, 40)).astype(np.float32))
        for modules in (None, [1], [3, 0]):
            rows = layout.decode(tensors, modules)
            queries = rng.standard_normal((rows.shape[1], 4)).astype(np.float32)
            found = layout.products(tensors, queries, modules, None, scratch)
            np.testing.assert_allclose(found, rows @ queries, rtol=1e-4, atol=1e-4)
