"""How a long pass tells where it is; the CLI draws bars, a library call says nothing."""

from __future__ import annotations

from collections.abc import Callable
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


def scaled(advance: Callable[[int], None], part: int, whole: int) -> Callable[[int], None]:
    """An ``advance`` that tells of a part as if it were the whole: of what all processes do, as the first gets on.

    >>> told = []
    >>> advance = scaled(told.append, 4, 10)
    >>> advance(1), advance(3)
    (None, None)
    >>> told
    [2, 8]
    """
    done = reached = 0

    def scaled_advance(amount: int) -> None:
        nonlocal done, reached
        done += amount
        before, reached = reached, done * whole // max(part, 1)
        advance(reached - before)

    return scaled_advance


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
