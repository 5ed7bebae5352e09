"""Small stores for every test: the same arrays whenever the same arguments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gradstore import GradientStore, StoreWriter


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can't see whether a disk was synced; `test_format.py` checks the order of the calls instead."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


PLAN = {"model": "m", "sketch": {"kind": "two-sided", "seed": 0}}


@dataclass
class Arrays:
    rows: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    sq_norm: np.ndarray
    texts: list[dict]

    def side(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: getattr(self, name)[start:stop] for name in ("loss", "tokens", "sq_norm")}


def make_arrays(rows: int, width: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, width)).astype(np.float32)
    return Arrays(
        rows=values,
        loss=rng.random(rows).astype(np.float32),
        tokens=rng.integers(1, 99, rows).astype(np.int32),
        sq_norm=(values**2).sum(1),
        texts=[{"text": f"text {i} – {'ü' * (i % 5)}", "id": i} for i in range(rows)],
    )


def write_store(
    path: Path, arrays: Arrays, *, columns: dict[str, int] | None = None, order: int = 1, **options
) -> Path:
    columns = columns if columns is not None else {"a": arrays.rows.shape[1]}
    with StoreWriter.create(path, rows=len(arrays.rows), columns=columns, plan=PLAN, **options) as writer:
        writer.write_data(arrays.texts)
        for shard, start, stop in writer.pending[::order]:
            writer.write(shard, arrays.rows[start:stop], arrays.side(start, stop))
    return path


@pytest.fixture
def arrays() -> Arrays:
    return make_arrays(100, 12)


@pytest.fixture
def make() -> Callable[..., Arrays]:
    return make_arrays


@pytest.fixture
def plan() -> dict:
    return PLAN


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_store


@pytest.fixture
def store(tmp_path: Path, arrays: Arrays) -> GradientStore:
    """100 rows of two modules (4 + 8 floats) in four shards of 30, 30, 30 and 10."""
    return GradientStore.open(write_store(tmp_path / "s", arrays, columns={"a": 4, "b": 8}, rows_per_shard=30))


def folder_bytes(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(name="folder_bytes")
def _folder_bytes() -> Callable[[Path], dict[str, bytes]]:
    return folder_bytes
