"""What a store costs to write and to open.

    python benchmarks/store.py            # write throughput, a build's share, 10^7 rows

Prints ratios taken in one run, medians of interleaved repetitions: shards against a raw sequential write of the same
bytes (each synced at the end of a file), a build against the same build whose writer drops what it is handed, and the
seconds to open a store of 10^7 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
from _setup import articles, interleaved
from _shapes import model_of

from gradstore import GradientStore, StoreWriter


def write(path: Path, rows: np.ndarray, shards: int, dtype: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with StoreWriter.create(
        path,
        rows=shards * len(rows),
        columns={f"m{i}": rows.shape[1] // 16 for i in range(16)},
        plan={},
        dtype=dtype,
        rows_per_shard=len(rows),
        side_columns=(),
        data=False,
    ) as writer:
        for shard, _, _ in writer.pending:
            writer.write(shard, rows)


def write_raw(store: Path, path: Path) -> None:
    """The bytes of the store's shards, from memory, file by file."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for shard in sorted((store / "shards").iterdir()):
        with open(path / shard.name, "wb", buffering=0) as file:
            file.write(bytes(shard.stat().st_size))
            os.fsync(file.fileno())


def writing(folder: Path, repeats: int) -> dict[str, float]:
    rows = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)
    ratios = {}
    for dtype in ("fp32", "fp16", "int4"):
        store = folder / dtype
        write(store, rows, 8, dtype)
        actions = {
            "store": lambda store=store, dtype=dtype: write(folder / "again", rows, 8, dtype),
            "raw": lambda store=store: write_raw(store, folder / "raw"),
        }
        seconds = interleaved(actions, repeats)
        ratios[dtype] = round(seconds["raw"] / seconds["store"], 2)
        for each in (store, folder / "again", folder / "raw"):
            shutil.rmtree(each)
    return ratios


def building(folder: Path, repeats: int) -> float:
    """The share of a build that its writer costs."""
    from attribute import DataConfig, IndexConfig, collect_gradients

    words = articles(60)
    records = [{"input_ids": [zlib.crc32(word.encode()) % 50_000 for word in text.split()[:300]]} for text in words]
    model, config = model_of("pythia-14m"), IndexConfig(projection_dim=16, data=DataConfig(truncation=True))

    def build() -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        collect_gradients(model, records, folder / "run", config=config)

    def build_without() -> None:
        shutil.rmtree(folder / "run", ignore_errors=True)
        with (
            mock.patch.object(StoreWriter, "write"),
            mock.patch.object(StoreWriter, "finish", StoreWriter.close),
            mock.patch("attribute.index.GradientStore.open"),
        ):
            collect_gradients(model, records, folder / "run", config=config)

    seconds = interleaved({"with": build, "without": build_without}, repeats)
    return round(1 - seconds["without"] / seconds["with"], 3)


def opening(folder: Path, repeats: int) -> dict[str, float]:
    path = folder / "ten-million"
    with StoreWriter.create(path, rows=10**7, columns={}, plan={}, side_columns=("loss",), data=False) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, np.empty((stop - start, 0), np.float32), {"loss": np.zeros(stop - start)})
    shards = len(GradientStore.open(path).shards)
    seconds = interleaved({"open": lambda: GradientStore.open(path)}, repeats)
    return {"shards": shards, "seconds": round(seconds["open"], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to write: the disk that is measured")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for label, measure in (
            ("raw synced write / store write", writing),
            ("open 10^7 rows", opening),
            ("writer's share of a build", building),
        ):
            print(json.dumps({label: measure(folder, options.repeats)}), flush=True)


if __name__ == "__main__":
    main()
