"""Rows of an epoch that has not ended, in the order of the training: a resumed one cuts off what comes again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import RunError

_ROWS, _LINES = "rows.f32", "lines.jsonl"


class RowLog:
    """A folder of two files: the rows, ``[n, width]`` of float32, and a line of JSON beside each, which counts it.

    Example::

        log = RowLog(Path("runs/example/train/epoch_0.rows"), plan.width)
        log.append([{"row": 7, "step": 0}, {"row": 2, "step": 0}], gradients)     # [2, width]
        log.forget_from(0)                                                        # step 0 is made again

    Args:
        folder: made by the first row that comes.
        width: floats of a row.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self._width = width

    def append(self, lines: Sequence[Mapping[str, Any]], rows: np.ndarray) -> None:
        """Add rows, whose lines say the ``step``. They come first: a torn end has no line that counts it."""
        assert rows.shape == (len(lines), self._width)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _ROWS).open("ab") as stream:
            np.ascontiguousarray(rows, "<f4").tofile(stream)
        with (self.folder / _LINES).open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))

    def lines(self) -> Iterator[dict[str, Any]]:
        """What was said of each row that is whole."""
        if self._whole():
            with (self.folder / _LINES).open(encoding="utf-8") as stream:
                for line in islice(stream, self._whole()):
                    if line.endswith("\n"):
                        yield json.loads(line)

    def rows(self, count: int) -> np.ndarray:
        """The first rows, mapped, ``[count, width]``."""
        return np.memmap(self.folder / _ROWS, dtype="<f4", mode="r", shape=(count, self._width))

    def steps(self) -> tuple[int, int]:
        """The first step, and the one after the last; of an empty log ``(0, 0)``."""
        found = [int(line["step"]) for line in self.lines()]
        return (found[0], found[-1] + 1) if found else (0, 0)

    def forget_from(self, step: int) -> None:
        """Cut off what comes again, and an end that a killed training has torn; nothing is left of an empty log."""
        kept = cut_from(self.folder / _LINES, step, most=self._whole()) if self._whole() else 0
        if kept:
            os.truncate(self.folder / _ROWS, kept * 4 * self._width)
        else:
            self.remove()

    def remove(self) -> None:
        """Leave the folder away, if there is one."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _whole(self) -> int:
        """Rows that lie there in full, of which the last may have no line."""
        rows = self.folder / _ROWS
        if not rows.exists() or not (self.folder / _LINES).exists():
            return 0
        return rows.stat().st_size // (4 * self._width)


def cut_from(file: Path, step: int, *, most: int | None = None) -> int:
    """Shorten a file of lines ``{"step": …}`` to those before a step, and leave a torn one away.

    Returns:
        How many lines are left, ``most`` at most.

    Raises:
        RunError: a whole line that says no step.
    """
    kept = end = 0
    with file.open("rb") as stream:
        for line in stream:
            if kept == most or not line.endswith(b"\n"):
                break
            try:
                if json.loads(line)["step"] >= step:
                    break
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(
                    f"{file}: line {kept + 1} says no step, so that what a resumed training makes again cannot be "
                    "told: give the callback another path"
                ) from error
            kept, end = kept + 1, end + len(line)
    os.truncate(file, end)
    return kept
