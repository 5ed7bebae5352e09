"""How a long pass tells where it is; the CLI draws bars, a library call says nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what happens. A stage is a label with a total; ``advance`` moves it on."""

    def note(self, message: str) -> None:
        """Something the person should know: a choice made for them, a peculiarity of the data."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        """A stage of ``total`` units begins (``None``: nobody knows how many)."""

    def advance(self, amount: int) -> None:
        """So many units more are done."""

    def stop(self) -> None:
        """The stage is over."""


class Quiet:
    """Says nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        """Nothing."""

    def advance(self, amount: int) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""
