"""What a person at the terminal sees while a run runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Stages = Callable[[str, int, int], None]
"""Called with what is being done, batches done, and of how many."""


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


@contextmanager
def stages() -> Iterator[Stages]:
    """A progress bar on stderr for each stage of a longer command, with batches per second and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, tuple[TaskID, float, int]] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # What a resumed command finds done took it no time.
                tasks[stage] = progress.add_task(stage, total=total, speed=""), time.perf_counter(), done
            task, since, before = tasks[stage]
            speed = (done - before) / max(time.perf_counter() - since, 1e-9)
            progress.update(task, completed=done, speed=f"{speed:.2f} batches/s" if done > before else "")

        yield advance


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
