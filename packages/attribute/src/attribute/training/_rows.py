"""Rows of a dataset, which come in the order of the sampler: their store has the order of the dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import RunError
from attribute.training._batch import Batch
from attribute.training._log import RowLog
from gradcore import CapturePlan
from gradstore import GradientStore, StoreWriter

_AT_ONCE = 1024  # rows of a store that are copied back


class DatasetRows:
    """Stores with a row for each row of the dataset.

    ``times`` says how often the sampler drew it, ``step`` in which optimiser step it came last (-1: never).

    Args:
        rows: of the dataset.
        records: its rows, if they can be kept beside their gradients.
    """

    def __init__(self, rows: int, records: Iterable[Mapping[str, Any]] | None = None) -> None:
        self.about = {"kind": "rows of a dataset", "rows": rows}
        self._rows, self._records = rows, records

    def lines(self, batch: Batch) -> list[dict[str, Any]]:
        """The number of each row."""
        return [{"row": int(row), "step": batch.step} for row in batch.rows]

    def write(self, path: Path, plan: CapturePlan, log: RowLog, meta: Mapping[str, Any]) -> None:
        """Sort the log by rows; one that was drawn again has the sum of its gradients, one that never came zeros."""
        came = [(line["row"], line["step"]) for line in log.lines()]
        numbers, steps = np.array(came, dtype=np.int64).reshape(-1, 2).T
        rows, order = log.rows(len(numbers)), np.argsort(numbers, kind="stable")
        times = np.bincount(numbers, minlength=self._rows)
        last = np.full(self._rows, -1, dtype=np.int64)
        np.maximum.at(last, numbers, steps)
        with StoreWriter.create(
            path,
            rows=self._rows,
            columns=plan.columns,
            plan={"capture": plan.to_dict()},
            meta=meta,
            side_columns={"times": "int32", "step": "int64"},
            data=self._records is not None,
        ) as writer:
            if self._records is not None:
                writer.write_data(self._records)
            for shard, start, stop in writer.pending:
                block = np.zeros((stop - start, plan.width), dtype=np.float32)
                left, right = np.searchsorted(numbers[order], [start, stop])
                if left < right:
                    found, firsts = np.unique(numbers[order[left:right]], return_index=True)
                    block[found - start] = np.add.reduceat(rows[order[left:right]], firsts, axis=0)
                writer.write(shard, block, {"times": times[start:stop], "step": last[start:stop]})

    def read(self, path: Path, step: int) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
        """Rows that came before the step, in the order of their steps.

        Raises:
            RunError: the sampler drew a row again, whose sum cannot be taken apart.
        """
        store = GradientStore.open(path)
        times, steps = store.side("times"), store.side("step")
        if (times > 1).any():
            raise RunError(
                f"{path} is finished, and its row {int(times.argmax())} came {int(times.max())} times: what it had "
                f"before step {step} cannot be told from the sum. Resume from a checkpoint at an end of the epoch, or "
                "give the callback another path"
            )
        order = np.argsort(steps, kind="stable")
        order = order[(steps[order] >= 0) & (steps[order] < step)]
        for start in range(0, len(order), _AT_ONCE):
            part = order[start : start + _AT_ONCE]
            lines = [{"row": int(row), "step": int(steps[row])} for row in part]
            yield lines, np.stack([store.row(int(row)) for row in part])
