"""What a training has left on disk, and with which of it a resumed one goes on.

A checkpoint says whose it is (the trainer's state holds the run's id), ``run.json`` which run the folder holds and
which epochs are finished. A training that is resumed at step s by a checkpoint of the run makes the steps from s on
again: what they left is dropped, in unfinished epochs and finished ones. Anything else is refused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attribute._errors import RunError
from attribute.training._batch import RowKind
from attribute.training._log import RowLog, cut_from
from gradcore import CapturePlan

ORDER = "order.jsonl"
WHOLE = 1e-9  # the trainer counts epochs in fractions of a step
_FILE = "run.json"

_logger = logging.getLogger(__name__)


class Run:
    """The folder of a run: ``train/epoch_N``, the stores; ``train/epoch_N.rows``, the logs; ``run.json``.

    ``run.json`` has the finished epochs with their steps (first, and one after the last). It is written when a store is
    whole, and before one is removed; so what a killed training leaves is told from it: a listed epoch is its store, any
    other its log.

    Example::

        run = Run(Path("runs/example"), plan, kind, options)
        state["run"] = run.begin(step=0, epoch=0.0, claimed=None, meta=meta)
        run.put(0, lines, gradients)
        run.finish(0, {})

    Args:
        path: the folder.
        plan: what is captured.
        kind: what the rows are.
        options: JSON of all else that a row's numbers depend on.
    """

    def __init__(self, path: Path, plan: CapturePlan, kind: RowKind, options: Mapping[str, Any]) -> None:
        self.path = path
        self._plan, self._kind = plan, kind
        about = {**kind.about, **options, "plan": plan.to_dict()}
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        self._run = ""
        self._finished: dict[int, tuple[int, int]] = {}
        self._open: int | None = None

    def begin(self, step: int, epoch: float, claimed: str | None, meta: Callable[[float], Any]) -> str:
        """Make the folder what it was at a step, or begin it.

        Args:
            step, epoch: optimiser steps and epochs behind the training.
            claimed: the id of the run, by the checkpoint from which it is resumed.
            meta: by the epochs that are over, of stores that a killed training did not come to write.

        Returns:
            The id of the run, for its checkpoints.

        Raises:
            RunError: rows lie there and it cannot be told, or is not so, that this training goes on with them.
        """
        if not self._left():
            self._run, self._finished = uuid.uuid4().hex, {}
            if step:
                _logger.warning(
                    "%s: no rows of the %d steps before the checkpoint are here; those of its epoch will be missing",
                    self.path, step,
                )  # fmt: skip
            self._save()
            return self._run
        self._require_own(step, claimed)
        over = {number for number in (*self._finished, *self.unfinished()) if number + 1 <= epoch + WHOLE}
        self._rewind(step, over)
        for number in over.intersection(self.unfinished()):
            self.finish(number, meta(number + 1.0))
        return self._run

    def put(self, number: int, lines: Sequence[Mapping[str, Any]], gradients: np.ndarray) -> None:
        """Add rows ``[n, width]`` to an epoch, with a line that says the step of each.

        Raises:
            RunError: another epoch has not ended.
        """
        if self._open != number:
            others = [each for each in self.unfinished() if each != number]
            if others:
                raise RunError(
                    f"rows of epoch {number} come, but epoch {others[0]} has not ended: a callback has cut it short, "
                    "or the resumed training has other batches or accumulation. Epochs can then not be told apart: "
                    "resume with those of the checkpoint, or give the callback another path"
                )
            _require_free(self._store(number))
            self._open = number
        self._log(number).append(lines, gradients)

    def finish(self, number: int, meta: Mapping[str, Any]) -> None:
        """Write the store of an epoch, if it has rows, and leave its log away."""
        log = self._log(number)
        first, end = log.steps()
        if end:
            _require_free(self._store(number))
            self._kind.write(self._store(number), self._plan, log, meta)
            self._finished[number] = (first, end)
            self._save()
            log.remove()
        self._open = None

    def unfinished(self) -> list[int]:
        """Epochs with a log; one of an epoch that is listed is about to be removed."""
        names = [each.name.removeprefix("epoch_") for each in (self.path / "train").glob("epoch_*.rows")]
        numbers = {int(name.removesuffix(".rows")) for name in names if name.removesuffix(".rows").isdigit()}
        return sorted(numbers - set(self._finished))

    def _require_own(self, step: int, claimed: str | None) -> None:
        """Refuse what another training has left, or this one with other options, or what ends before the step."""
        what = next(iter(self._left()))
        ways = f"give the callback another path, or remove {self.path}"
        known = _read(self.path / _FILE)
        if not step or known is None or known["run"] != claimed:
            why = "resumed from none of its checkpoints"
            if step:
                why = f"resumed from one at step {step} that is not known to be of the same run"
            raise RunError(
                f"{what} exists already, and this training is {why}: resume it from its own "
                f"(trainer.train(resume_from_checkpoint=…)), {ways}"
            )
        for name, value in self._about.items():
            if (was := known["about"].get(name)) != value:
                shown = "" if name == "plan" else f" ({was!r} before, {value!r} now)"
                raise RunError(
                    f"{what} was collected with another {name}{shown}: resume the training with what it was begun "
                    f"with, {ways}"
                )
        self._run = known["run"]
        self._finished = {int(number): (first, end) for number, (first, end) in known["epochs"].items()}
        ends = [end for _, end in self._finished.values()] + [self._log(each).steps()[1] for each in self.unfinished()]
        if max(ends, default=0) < step:
            raise RunError(
                f"{self.path} has rows up to step {max(ends, default=0)} only, and the checkpoint is of step {step}: "
                "the training was resumed from an earlier one in between, or files are lost. Resume from one "
                f"that is no later, {ways}"
            )

    def _rewind(self, step: int, over: Collection[int]) -> None:
        """Drop what is made again, and take up again epochs that are not over, though their store is written."""
        for number, (first, end) in sorted(self._finished.items()):
            self._log(number).remove()
            if end <= step and number in over:
                continue
            if end > step:
                _logger.warning(
                    "%s has the steps %d to %d, and the training is resumed at step %d: rows from there on are dropped "
                    "and made again",
                    self._store(number),
                    first,
                    end - 1,
                    step,
                )
            if first < step:
                for lines, rows in self._kind.read(self._store(number), step):
                    self._log(number).append(lines, rows)
            del self._finished[number]
            self._save()
            shutil.rmtree(self._store(number))
        for number in self.unfinished():
            if self._store(number).exists():  # half written, or whole and not yet listed
                shutil.rmtree(self._store(number))
            self._log(number).forget_from(step)
        if (self.path / ORDER).exists():
            cut_from(self.path / ORDER, step)

    def _left(self) -> list[Path]:
        """What a training has left."""
        order = [self.path / ORDER] if (self.path / ORDER).exists() else []
        return [*sorted((self.path / "train").glob("epoch_*")), *order]

    def _store(self, number: int) -> Path:
        return self.path / "train" / f"epoch_{number}"

    def _log(self, number: int) -> RowLog:
        return RowLog(self.path / "train" / f"epoch_{number}.rows", self._plan.width)

    def _save(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        epochs = {str(number): list(steps) for number, steps in sorted(self._finished.items())}
        temporary = self.path / f"{_FILE}.tmp"
        temporary.write_text(json.dumps({"run": self._run, "epochs": epochs, "about": self._about}), encoding="utf-8")
        os.replace(temporary, self.path / _FILE)


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _require_free(path: Path) -> None:
    if path.exists():
        raise RunError(f"{path} exists already: give the callback another path")
