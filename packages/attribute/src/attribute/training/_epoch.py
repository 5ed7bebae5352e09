"""The rows of one epoch while they come in the order of the sampler, and their store when all are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import RunError
from attribute.training._batch import Batch
from gradcore import CapturePlan
from gradstore import GradientStore, StoreWriter

_ABOUT, _ROWS, _COUNTS = "about.json", "rows.f32", "counts.i32"


class EpochRows:
    """A scratch folder ``epoch_N.rows`` beside the store: rows in dataset order, memory-mapped.

    A training that stops finds them again.
    """

    def __init__(
        self, path: Path, plan: CapturePlan, rows: int, records: Iterable[Mapping[str, Any]] | None = None
    ) -> None:
        self.path = path
        self._plan, self._records = plan, records
        self._folder, fresh = scratch_folder(path, {"plan": plan.to_dict(), "rows": rows})
        if fresh is not None:
            np.zeros(rows * plan.width, dtype="<f4").tofile(self._folder / _ROWS)
            np.zeros(rows, dtype="<i4").tofile(self._folder / _COUNTS)
            begin_scratch(self._folder, fresh)
        self._rows = np.memmap(self._folder / _ROWS, dtype="<f4", mode="r+", shape=(rows, plan.width))
        self._counts = np.memmap(self._folder / _COUNTS, dtype="<i4", mode="r+", shape=(rows,))

    def put(self, batch: Batch, gradients: np.ndarray) -> None:
        """What a batch gave; a row that a sampler draws again has the sum of its gradients."""
        np.add.at(self._rows, batch.rows, gradients)
        np.add.at(self._counts, batch.rows, 1)

    def finish(self, meta: dict[str, Any]) -> GradientStore:
        """Write the store and leave the scratch folder away. Rows that no batch had are zero, with ``times`` 0."""
        require_free(self.path)
        with StoreWriter.create(
            self.path,
            rows=len(self._rows),
            columns=self._plan.columns,
            plan={"capture": self._plan.to_dict()},
            meta=meta,
            side_columns={"times": "int32"},
            data=self._records is not None,
        ) as writer:
            if self._records is not None:
                writer.write_data(self._records)
            for shard, start, stop in writer.pending:
                writer.write(shard, np.array(self._rows[start:stop]), {"times": np.array(self._counts[start:stop])})
        del self._rows, self._counts
        shutil.rmtree(self._folder)
        return GradientStore.open(self.path)


def scratch_folder(path: Path, about: Mapping[str, Any]) -> tuple[Path, Mapping[str, Any] | None]:
    """The scratch folder beside a store, and what :func:`begin_scratch` is to write into it unless it was begun.

    Raises:
        RunError: it holds the rows of a training about which something else is said.
    """
    folder = path.with_name(path.name + ".rows")
    if not (folder / _ABOUT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        return folder, about
    if json.loads((folder / _ABOUT).read_text(encoding="utf-8")) != json.loads(json.dumps(about)):
        raise RunError(f"{folder} holds rows of another training: move it away, or give the callback another path")
    return folder, None


def begin_scratch(folder: Path, about: Mapping[str, Any]) -> None:
    """Say what the folder holds, once its files are there: half a folder is begun anew."""
    temporary = folder / f"{_ABOUT}.tmp"
    temporary.write_text(json.dumps(about), encoding="utf-8")
    os.replace(temporary, folder / _ABOUT)


def require_free(path: Path) -> None:
    """Raise :class:`RunError` where a store would be overwritten."""
    if path.exists():
        raise RunError(f"{path} exists already: give the callback another path")
