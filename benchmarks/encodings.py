"""What an encoding costs: bytes per row against the ranking by exact gradients.

    trace build exact  --model M --dataset D --truncation --projection-dim 0
    trace build side8  --model M --dataset D --truncation --projection-dim 8      # and 16, 32 …
    python benchmarks/encodings.py exact side8 side16 side32

Rows of the store serve as queries, in fp32; only the store is quantised. Spearman and recall@20 compare the cosine
ranking of all other rows with that of the whole, unsketched gradients; means over the queries.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from gradstore import GradientStore, StoreWriter, scores

DTYPES = ("fp32", "fp16", "int8", "int4", "int2", "int1")


def reencode(store: GradientStore, path: Path, dtype: str) -> GradientStore:
    columns = dict(zip(store.columns, store.layout.widths))
    with StoreWriter.create(
        path, rows=store.rows, columns=columns, plan=store.plan, dtype=dtype, side_columns=(), data=False
    ) as writer:
        for shard, start, stop in writer.pending:
            writer.write(shard, store.block(start, stop))
    return GradientStore.open(path)


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort(axis=1).argsort(axis=1).astype(np.float64)


def compare(found: np.ndarray, exact: np.ndarray, queries: np.ndarray) -> tuple[float, float]:
    """Mean Spearman and mean recall@20 over queries, which don't count as their own hits."""
    others = ~(queries[:, None] == np.arange(exact.shape[1]))
    found, exact = (values[others].reshape(len(queries), -1) for values in (found, exact))
    a, b = (r - r.mean(axis=1, keepdims=True) for r in (ranks(found), ranks(exact)))
    spearman = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    top = [set(np.argsort(-values, axis=1)[i, :20]) for i in range(len(queries)) for values in (found, exact)]
    recall = [len(top[i] & top[i + 1]) / 20 for i in range(0, len(top), 2)]
    return float(spearman.mean()), float(np.mean(recall))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exact", type=Path)
    parser.add_argument("sketched", type=Path, nargs="+")
    parser.add_argument("--queries", type=int, default=40)
    options = parser.parse_args()
    truth = GradientStore.open(options.exact)
    queries = np.random.default_rng(0).choice(truth.rows, options.queries, replace=False)
    exact = scores(truth, np.stack([truth.row(int(q)) for q in queries]), metric="cos")
    results: list[tuple[int, str, str, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in options.sketched:
            store = GradientStore.open(path)
            vectors = np.stack([store.row(int(q)) for q in queries])
            for dtype in DTYPES:
                encoded = reencode(store, Path(folder) / f"{path.name}-{dtype}", dtype)
                found = scores(encoded, vectors, metric="cos")
                results.append((encoded.layout.row_bytes, path.name, dtype, *compare(found, exact, queries)))
    print("| bytes a row | store | encoding | Spearman | recall@20 |")
    print("|---|---|---|---|---|")
    for size, name, dtype, spearman, recall in sorted(results):
        print(f"| {size:,} | {name} | {dtype} | {spearman:.3f} | {recall:.2f} |")


if __name__ == "__main__":
    main()
