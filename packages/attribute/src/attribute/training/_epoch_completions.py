"""The sampled rows of one epoch, one a completion and optimiser step, and their store when all are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from attribute.training._batch import Batch
from attribute.training._epoch import begin_scratch, require_free, scratch_folder
from gradcore import CapturePlan
from gradstore import GradientStore, StoreWriter

_ROWS, _LINES = "rows.f32", "completions.jsonl"

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


class _Line(TypedDict):
    row: int
    generation: int
    step: int
    reward: float | None
    advantage: float
    tokens: int
    completion: Any
    completion_ids: list[int]


class EpochCompletions:
    """A scratch folder ``epoch_N.rows`` beside the store, to which rows are appended in the order of the training.

    Example::

        epoch = EpochCompletions(Path("runs/grpo/train/epoch_0"), plan, dataset, step=0)
        epoch.put(batch, gradients)                # [n, plan.width], of n completions
        store = epoch.finish({})
        store.side("reward"), store.data(0)["completion"]

    Args:
        path: the store to be.
        plan: what is captured.
        records: the dataset's rows, which are read by number.
        step: the first optimiser step that comes; a training that is resumed makes its steps from there on again.

    Raises:
        RunError: the scratch folder holds rows of another plan; the store exists.
    """

    def __init__(self, path: Path, plan: CapturePlan, records: Sequence[Any], step: int) -> None:
        self.path = path
        self._plan, self._records = plan, records
        self._folder, fresh = scratch_folder(path, {"plan": plan.to_dict(), "completions": True})
        for name in (_ROWS, _LINES):
            (self._folder / name).open("ab" if fresh is None else "wb").close()
        if fresh is not None:
            begin_scratch(self._folder, fresh)
        self._forget_from(step)

    def put(self, batch: Batch, gradients: np.ndarray) -> None:
        """Append a batch: its gradients first, so that a torn end has no line that counts it."""
        with (self._folder / _ROWS).open("ab") as stream:
            np.ascontiguousarray(gradients, "<f4").tofile(stream)
        lines = [
            _Line(
                row=int(row),
                generation=each.generation,
                step=batch.step,
                reward=each.reward,
                advantage=each.advantage,
                tokens=each.tokens,
                completion=each.content,
                completion_ids=each.ids,
            )
            for row, each in zip(batch.rows, batch.completions, strict=True)
        ]
        with (self._folder / _LINES).open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))

    def finish(self, meta: dict[str, Any]) -> GradientStore:
        """Write the store, rows in the order of the training, and leave the scratch folder away."""
        require_free(self.path)
        side = self._side()
        count = len(side["row"])
        rows = np.memmap(self._folder / _ROWS, dtype="<f4", mode="r", shape=(count, self._plan.width))
        with StoreWriter.create(
            self.path,
            rows=count,
            columns=self._plan.columns,
            plan={"capture": self._plan.to_dict()},
            meta=meta,
            side_columns=SIDE,
        ) as writer:
            writer.write_data(
                {**self._records[line["row"]], COMPLETION: line["completion"], IDS: line["completion_ids"]}
                for line in self._lines()
            )
            for shard, start, stop in writer.pending:
                writer.write(
                    shard, np.array(rows[start:stop]), {name: values[start:stop] for name, values in side.items()}
                )
        del rows
        shutil.rmtree(self._folder)
        return GradientStore.open(self.path)

    def _side(self) -> dict[str, np.ndarray]:
        found: dict[str, list[float]] = {name: [] for name in SIDE}
        for line in self._lines():
            for name in ("row", "generation", "step", "advantage", "tokens"):
                found[name].append(line[name])
            found["reward"].append(line["reward"] or 0.0)
            found["scored"].append(line["reward"] is not None)
        dtypes = {"int32": np.int32, "int64": np.int64, "fp32": np.float32}
        return {name: np.array(values, dtypes[SIDE[name]]) for name, values in found.items()}

    def _lines(self) -> Iterator[_Line]:
        with (self._folder / _LINES).open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)

    def _forget_from(self, step: int) -> None:
        """Cut off what comes again, and an end that a killed training has torn."""
        kept = end = 0
        with (self._folder / _LINES).open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                    break
                kept, end = kept + 1, end + len(line)
        os.truncate(self._folder / _LINES, end)
        os.truncate(self._folder / _ROWS, kept * self._plan.width * 4)
