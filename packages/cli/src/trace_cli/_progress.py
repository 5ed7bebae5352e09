"""Bars with rate and remaining time on stderr; notes above them."""

from __future__ import annotations

import time


class Bars:
    """Draws the progress that the libraries report; on a pipe it prints a line a stage instead."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._progress = None
        self._task = None
        self._started = 0.0
        self._label = ""
        self._unit = ""
        self._done = 0

    def note(self, message: str) -> None:
        """A line of its own."""
        from rich.markup import escape

        self._console.print(f"[dim]·[/dim] {escape(message)}", soft_wrap=True)

    def start(self, label: str, total: int | None, unit: str) -> None:
        """A new bar."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._label, self._unit, self._done, self._started = label, unit, 0, time.perf_counter()
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(label, total=total, rate="")

    def advance(self, amount: int) -> None:
        """Move the bar."""
        self._done += amount
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=amount, rate=self._rate())

    def stop(self) -> None:
        """Replace the bar by a line that stays."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None
        seconds = time.perf_counter() - self._started
        self.note(f"{self._label}: {self._done:,} {self._unit} in {seconds:.1f} s ({self._rate()})")

    def _rate(self) -> str:
        return f"{self._done / max(time.perf_counter() - self._started, 1e-9):,.0f} {self._unit}/s"
