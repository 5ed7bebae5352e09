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
from gradcore import CapturePlan
from gradstore import GradientStore, StoreWriter

_ABOUT, _ROWS, _COUNTS = "about.json", "rows.f32", "counts.i32"


class EpochRows:
    """A scratch folder ``epoch_N.rows`` beside the store: rows in dataset order, memory-mapped.

    A training that stops finds them again.
    """

    def __init__(self, path: Path, plan: CapturePlan, rows: int) -> None:
        self.path = path
        self._folder = path.with_name(path.name + ".rows")
        self._plan = plan
        about = {"plan": plan.to_dict(), "rows": rows}
        if self._folder.exists():
            found = json.loads((self._folder / _ABOUT).read_text(encoding="utf-8"))
            if found != json.loads(json.dumps(about)):
                raise RunError(
                    f"{self._folder} holds rows of another training: move it away, or give the callback another path"
                )
        else:
            self._folder.mkdir(parents=True)
            np.zeros(rows * plan.width, dtype="<f4").tofile(self._folder / _ROWS)
            np.zeros(rows, dtype="<i4").tofile(self._folder / _COUNTS)
            temporary = self._folder / f"{_ABOUT}.tmp"
            temporary.write_text(json.dumps(about), encoding="utf-8")
            os.replace(temporary, self._folder / _ABOUT)
        self._rows = np.memmap(self._folder / _ROWS, dtype="<f4", mode="r+", shape=(rows, plan.width))
        self._counts = np.memmap(self._folder / _COUNTS, dtype="<i4", mode="r+", shape=(rows,))

    def put(self, rows: np.ndarray, gradients: np.ndarray) -> None:
        """What a batch gave; a row that a sampler draws again has the sum of its gradients."""
        np.add.at(self._rows, rows, gradients)
        np.add.at(self._counts, rows, 1)

    @property
    def seen(self) -> int:
        """Rows that have come."""
        return int((self._counts > 0).sum())

    def finish(self, records: Iterable[Mapping[str, Any]] | None, meta: dict[str, Any]) -> GradientStore:
        """Write the store and leave the scratch folder away. Rows that no batch had are zero, with ``times`` 0."""
        if self.path.exists():
            raise RunError(f"{self.path} exists already: give the callback another path")
        identity = {"capture": self._plan.to_dict()}
        with StoreWriter.create(
            self.path,
            rows=len(self._rows),
            columns=self._plan.columns,
            plan=identity,
            meta=meta,
            side_columns={"times": "int32"},
            data=records is not None,
        ) as writer:
            if records is not None:
                writer.write_data(records)
            for shard, start, stop in writer.pending:
                writer.write(shard, np.array(self._rows[start:stop]), {"times": np.array(self._counts[start:stop])})
        del self._rows, self._counts
        shutil.rmtree(self._folder)
        return GradientStore.open(self.path)
