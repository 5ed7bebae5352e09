"""Search speed against a plain read of the same bytes, NumPy on a memory map, and FAISS where it is installed.

    python benchmarks/search.py                                  # 10,000 x 4,096, 10 queries: seconds
    python benchmarks/search.py --rows 1000000 --queries 16 --dtypes int2 fp16 --folder /big/disk
    python benchmarks/search.py --without-torch                  # by NumPy alone

Every ratio is between two times taken in this run. `read` is the shard files through one reused buffer; warm, so it is
the speed of memory unless the store is larger than the page cache.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from gradstore import GradientStore, StoreWriter, search


def build(path: Path, rows: int, width: int, dtype: str) -> tuple[float, float]:
    """Write a store of Gaussian rows; returns seconds taken and seconds of a raw sequential write of the same bytes."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((8192 + 997, width), np.float32)
    start = time.perf_counter()
    with StoreWriter.create(
        path,
        rows=rows,
        columns={f"m{i}": width // 16 for i in range(16)},
        plan={},
        dtype=dtype,
        side_columns=(),
        data=False,
    ) as writer:
        for shard, first, stop in writer.pending:
            offset = shard * 131 % 997
            writer.write(shard, base[offset : offset + stop - first])
    took = time.perf_counter() - start
    raw = path.with_suffix(".raw")
    start = time.perf_counter()
    with open(raw, "wb", buffering=0) as file:
        for shard in sorted((path / "shards").iterdir()):
            file.write(bytes(shard.stat().st_size))
            os.fsync(file.fileno())
    written = time.perf_counter() - start
    raw.unlink()
    return took, written


def read(path: Path) -> None:
    buffer = bytearray(1 << 20)
    for shard in sorted((path / "shards").iterdir()):
        with open(shard, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def best(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_of_a_search(path: Path, queries: Path, module: str) -> float:
    """Peak resident memory, in MB, of a process that opens the store and searches it."""
    code = (
        f"import sys, {module}, numpy as np; from gradstore import GradientStore, search;"
        "search(GradientStore.open(sys.argv[1]), np.load(sys.argv[2]), 10, metric='cos');"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code, path, queries], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def numpy_memmap(path: Path, store: GradientStore, queries: np.ndarray) -> Callable[[], object]:
    """The ten lines that people write: float32 matrix on disk, blockwise product, argpartition."""
    flat = path.with_suffix(".bin")
    with open(flat, "wb") as file:
        for _, start, stop in store.shards:
            store.block(start, stop).tofile(file)
    matrix = np.memmap(flat, np.float32, "r", shape=(store.rows, store.width))

    def run() -> None:
        scores = np.concatenate([queries @ matrix[i : i + 4096].T for i in range(0, store.rows, 4096)], axis=1)
        np.argpartition(-scores, 10, axis=1)
        np.argpartition(scores, 10, axis=1)

    return run


def faiss_indexes(store: GradientStore, queries: np.ndarray) -> Iterator[tuple[str, Callable[[], object]]]:
    """One at a time, so that memory holds one; an index that would not fit is left out, and said so."""
    try:
        import faiss
    except ImportError:
        return
    for factory, floats in (("Flat", 4), ("SQfp16", 2), ("IVF64,SQfp16", 2)):
        needed = store.rows * store.width * floats
        if needed > 0.8 * available_memory():
            print(f"faiss {factory}: {needed / 1e9:.1f} GB do not fit into memory")
            continue
        index = faiss.index_factory(store.width, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(store.block(0, min(4096, store.rows)))
        for start in range(0, store.rows, 8192):
            index.add(store.block(start, min(start + 8192, store.rows)))
        yield f"faiss {factory} (top only)", partial(index.search, queries, 10)
        del index


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def row(name: str, seconds: float, size: int, reading: float) -> None:
    print(f"{name:28}{seconds:9.3f}{size / seconds / 1e9:7.2f}{reading / seconds:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "fp16", "bf16", "int8", "int4", "int2", "int1"])
    parser.add_argument("--faiss", nargs="*", default=["fp32"], help="also index the rows of these stores by FAISS")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    module = "numpy" if options.without_torch else "torch"
    if not options.without_torch:
        importlib.import_module("torch")  # a search uses what the process has
    queries = np.random.default_rng(1).standard_normal((options.queries, options.width), np.float32)
    print(
        f"{options.rows:,} x {options.width:,}, {options.queries} queries, top and bottom 10; best of {options.repeats}"
    )
    print(f"{'':28}{'seconds':>9}{'GB/s':>7}{'of read':>9}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        np.save(Path(folder) / "queries.npy", queries)
        for dtype in options.dtypes:
            path = Path(folder) / dtype
            took, raw = build(path, options.rows, options.width, dtype)
            size = sum(shard.stat().st_size for shard in (path / "shards").iterdir())
            print(
                f"{dtype + ' write':28}{took:9.3f}{size / took / 1e9:7.2f}   {raw / took:.2f} of a raw synced write",
                flush=True,
            )
            store = GradientStore.open(path)
            search(store, queries, 10)  # verified and warm from here on
            reading = best(partial(read, path), options.repeats)
            row(f"{dtype} read", reading, size, reading)
            for metric in ("dot", "cos"):
                call = partial(search, store, queries, 10, metric=metric, threads=options.threads)
                row(f"{dtype} {metric}", best(call, options.repeats), size, reading)
            print(f"{dtype + ' peak':28}{peak_of_a_search(path, Path(folder) / 'queries.npy', module):9.0f} MB")
            if dtype == "fp32":
                row("numpy memmap", best(numpy_memmap(path, store, queries), options.repeats), size, reading)
            if dtype in options.faiss:
                for name, call in faiss_indexes(store, queries):
                    row(name, best(call, options.repeats), size, reading)
                    del call  # the index with it: the next needs the memory
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
