"""Every implementation of the two sums gives the same numbers: a loop, torch's bag, gathers, and Triton.

Triton runs on CUDA where there is one, and everywhere under its interpreter, which is chosen when triton is imported:
hence the process of its own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from sparsify.kernels import fused, kernels_for, pieces

SHAPES = {"wide": (9, 300), "narrow": (40, 5), "one": (1, 1)}
TOLERANCE = {torch.float32: (1.3e-6, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}


def bag_by_loop(indices, rows, begin, weights):
    ends = [*begin.tolist(), len(indices)]
    products = rows.double()[indices] * weights.double()[:, None]
    return torch.stack([products[first:last].sum(0) for first, last in pairwise(ends)]).to(rows.dtype)


def case(shape, dtype, device):
    torch.manual_seed(0)
    m, d = SHAPES[shape]
    rows, tokens = torch.randn(m, d, dtype=dtype, device=device), torch.randn(6, d, dtype=dtype, device=device)
    begin = torch.tensor([0, 0, 7, 7, 30, 40], device=device)
    flat, weights = torch.randint(m, (40,), device=device), torch.randn(40, dtype=dtype, device=device)
    return rows, tokens, begin, flat, weights, torch.randint(m, (6, 11), device=device)


def check(kernels, shape, dtype, device="cpu"):
    rows, tokens, begin, flat, weights, indices = case(shape, dtype, device)
    rtol, atol = TOLERANCE[dtype]
    # One rounding of the result is all that a lower precision may cost; a CPU's bag of bfloat16 rounds every sum.
    atol = atol if kernels is not fused and kernels is not pieces else max(atol, 4 * torch.finfo(dtype).eps * 8)
    assert_close(kernels.bag(flat, rows, begin, weights), bag_by_loop(flat, rows, begin, weights), rtol=rtol, atol=atol)
    dots = (rows.double()[indices] * tokens.double()[:, None]).sum(-1).to(dtype)
    atol = max(atol, 4 * torch.finfo(torch.float32).eps * rows.shape[1] ** 0.5)
    assert_close(kernels.dots(indices, tokens, rows), dots, rtol=rtol, atol=atol)
    empty = kernels.dots(indices[:, :0], tokens, rows)
    assert empty.shape == (6, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernels", [fused, pieces], ids=["fused", "pieces"])
def test_sums_equal_a_loop(kernels, shape, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 6)
    check(kernels, shape, torch.float32)


def test_the_tensors_choose():
    assert kernels_for(torch.zeros(1)) is fused
    assert kernels_for(torch.zeros(1, device="meta")) is pieces


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_under_its_interpreter_equals_a_loop():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from test_kernels import SHAPES, TOLERANCE, check\n"
        "from sparsify.kernels import tiled\n"
        "for shape in SHAPES:\n"
        "    for dtype in TOLERANCE:\n"
        "        check(tiled, shape, dtype)\n"
        "print('equal')"
    )
    here = os.path.dirname(__file__)
    run = subprocess.run(
        [sys.executable, "-c", program, here],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_on_a_gpu_equals_a_loop(shape, dtype):
    rows = torch.zeros(1, dtype=dtype, device="cuda")
    assert kernels_for(rows).__name__.endswith("tiled")
    check(kernels_for(rows), shape, dtype, "cuda")
    assert kernels_for(rows.double()) is fused


def test_importing_the_package_imports_no_triton():
    program = "import sys, sparsify; print('sparsify.kernels.tiled' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("pointer", ["*fp32", "*bf16"])
def test_triton_compiles_for_a_gpu_that_is_not_here(pointer, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparsify.kernels import tiled

    kinds = {
        "indices": "*i64",
        "ends": "*i64",
        "k": "i32",
        "width": "i32",
        "ENTRIES": "constexpr",
        "COLUMNS": "constexpr",
    }
    for kernel in (tiled._bag, tiled._dots):
        signature = {name: kinds.get(name, pointer) for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {"ENTRIES": tiled.ENTRIES, "COLUMNS": tiled.COLUMNS})
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm["cubin"]
