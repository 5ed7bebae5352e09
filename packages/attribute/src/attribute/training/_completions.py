"""Rows that a policy sampled, one a completion and optimiser step: their store has the order of the training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attribute.training._batch import Batch
from attribute.training._log import RowLog
from gradcore import CapturePlan
from gradstore import GradientStore, StoreWriter

_AT_ONCE = 1024  # rows of a store that are copied back

COMPLETION, IDS = "completion", "completion_ids"
"""What a record of the store has beside the columns of its prompt."""

SIDE = {
    "row": "int64",
    "generation": "int32",
    "step": "int64",
    "reward": "fp32",
    "scored": "int32",
    "advantage": "fp32",
    "tokens": "int32",
}
"""The numbers beside each row."""


class Completions:
    """Stores with a row for each completion that a step learnt from.

    Args:
        records: the rows of the dataset of prompts, which are read by number.
    """

    def __init__(self, records: Sequence[Any]) -> None:
        self.about = {"kind": "completions", "rows": len(records)}
        self._records = records

    def lines(self, batch: Batch) -> list[dict[str, Any]]:
        """All that is known of each completion but its prompt."""
        return [
            {
                "row": int(row),
                "generation": each.generation,
                "step": batch.step,
                "reward": each.reward,
                "advantage": each.advantage,
                "tokens": each.tokens,
                COMPLETION: each.content,
                IDS: each.ids,
            }
            for row, each in zip(batch.rows, batch.completions, strict=True)
        ]

    def write(self, path: Path, plan: CapturePlan, log: RowLog, meta: Mapping[str, Any]) -> None:
        """Rows as they lie in the log, each with its prompt's columns beside its completion."""
        side = _side(log)
        rows = log.rows(len(side["row"]))
        with StoreWriter.create(
            path,
            rows=len(rows),
            columns=plan.columns,
            plan={"capture": plan.to_dict()},
            meta=meta,
            side_columns=SIDE,
        ) as writer:
            writer.write_data(
                {**self._records[line["row"]], COMPLETION: line[COMPLETION], IDS: line[IDS]} for line in log.lines()
            )
            for shard, start, stop in writer.pending:
                numbers = {name: values[start:stop] for name, values in side.items()}
                writer.write(shard, np.array(rows[start:stop]), numbers)

    def read(self, path: Path, step: int) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
        """The rows before the step, which are the first."""
        store = GradientStore.open(path)
        side = {name: store.side(name) for name in SIDE}
        kept = int((side["step"] < step).sum())
        for start in range(0, kept, _AT_ONCE):
            stop = min(start + _AT_ONCE, kept)
            lines: list[dict[str, Any]] = []
            for number in range(start, stop):
                line: dict[str, Any] = {name: side[name][number].item() for name in SIDE if name != "scored"}
                if not side["scored"][number]:
                    line["reward"] = None
                record = store.data(number)
                lines.append({**line, COMPLETION: record[COMPLETION], IDS: record[IDS]})
            yield lines, store.block(start, stop)


def _side(log: RowLog) -> dict[str, np.ndarray]:
    found: dict[str, list[float]] = {name: [] for name in SIDE}
    for line in log.lines():
        for name in ("row", "generation", "step", "advantage", "tokens"):
            found[name].append(line[name])
        found["reward"].append(line["reward"] or 0.0)
        found["scored"].append(line["reward"] is not None)
    dtypes = {"int32": np.int32, "int64": np.int64, "fp32": np.float32}
    return {name: np.array(values, dtypes[SIDE[name]]) for name, values in found.items()}
