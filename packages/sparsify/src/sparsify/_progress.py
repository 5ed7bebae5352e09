"""What a run says while it runs: a line per hookpoint on stderr, a JSON line per interval on disk, and any logger."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsify._errors import ConfigError


class Logger(Protocol):
    """Receives the averages of each logging interval; wandb, tensorboard and trackio all fit in a few lines."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Averages over the interval that ended with ``step``."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class JsonLines:
    """``metrics.jsonl``: one object per interval. Resuming at a step drops the lines after it."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        lines = path.read_text().splitlines() if path.exists() and resumed_at else []
        kept = [line for line in lines if json.loads(line)["step"] <= resumed_at]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Nothing is pending: every line was flushed."""
        self.file.close()


class WandbLogger:
    """Weights & Biases; the project comes from WANDB_PROJECT, "sparsify" by default."""

    def __init__(self, name: str | None, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError("log_to_wandb needs the wandb package: install it, or leave the option out") from None
        project = os.environ.get("WANDB_PROJECT", "sparsify")
        self.run = wandb.init(name=name, project=project, entity=os.environ.get("WANDB_ENTITY"), config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point per metric."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Mark the run finished."""
        self.run.finish()


class Terminal:
    """A progress bar on stderr with tokens per second and the latest averages."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[summary]}"),
        )
        console = Console(stderr=True)
        self.progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self.task = self.progress.add_task("training", total=total, completed=done, speed="", summary="")
        self.progress.start()
        self.tokens, self.since = 0, time.perf_counter()

    def advance(self, tokens: int) -> None:
        """One step of so many tokens is done."""
        self.tokens += tokens
        self.progress.advance(self.task)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the mean over hookpoints."""
        del step
        now = time.perf_counter()
        speed = f"{self.tokens / max(now - self.since, 1e-9):,.0f} tokens/s"
        self.tokens, self.since = 0, now
        shown = [
            f"{name} {mean:.4g}" for name in ("fvu", "ce", "kl", "dead", "l0") if (mean := _mean(metrics, name)) >= 0
        ]
        self.progress.update(self.task, speed=speed, summary=" ".join(shown))

    def close(self) -> None:
        """Leave the bar where it is."""
        self.progress.stop()


def _mean(metrics: Mapping[str, float], prefix: str) -> float:
    values = [value for name, value in metrics.items() if name == prefix or name.startswith(f"{prefix}/")]
    return sum(values) / len(values) if values else -1.0
