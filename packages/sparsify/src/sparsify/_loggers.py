"""Where a run's averages go beside the terminal: a file of lines, and the trackers people have. One class a tracker.

A tracker is imported only when it is asked for; the rest of the package does not know that it exists.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sparsify._errors import ConfigError


class Logger(Protocol):
    """Receives the averages of each logging interval."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Averages over the interval that ended with ``step``."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class JsonLines:
    """``metrics.jsonl``: one object per interval. Resuming at a step drops the lines after it, whole or half."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        lines = path.read_bytes().splitlines() if path.exists() and resumed_at else []
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in lines if _step_of(line) <= resumed_at))
        os.replace(temporary, path)
        self.file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Nothing is pending: every line was flushed."""
        self.file.close()


def _step_of(line: bytes) -> float:
    """A line's step; one that a killed run left half-written comes after all, since its interval is repeated."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Wandb:
    """Weights & Biases; the project comes from WANDB_PROJECT, "sparsify" by default."""

    def __init__(self, folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", "sparsify")
        self.run = _package("wandb").init(
            name=name, project=project, entity=os.environ.get("WANDB_ENTITY"), config=dict(config)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Mark the run finished."""
        self.run.finish()


class TensorBoard:
    """Event files under ``tensorboard/`` in the run's folder."""

    def __init__(self, folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
        _package("tensorboard")
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(folder / "tensorboard"))
        self.writer.add_text("config", "```json\n" + json.dumps(dict(config), indent=2) + "\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        for key, value in metrics.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Write what is pending."""
        self.writer.close()


class Trackio:
    """Trackio, local by default; the project comes from TRACKIO_PROJECT, "sparsify" by default."""

    def __init__(self, folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
        self.run = _package("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", "sparsify"), name=name, config=dict(config)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Mark the run finished."""
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, str | None, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"logging to {name} needs the {name} package: install it, or leave the option out") from None
