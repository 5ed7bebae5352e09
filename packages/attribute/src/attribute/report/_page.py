"""What a report says, as plain frozen values; :mod:`attribute.report._render` says it in HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attribute._errors import DataError
from attribute.evaluate import Quality


@dataclass(frozen=True)
class Entry:
    """A training text in a ranking.

    Attributes:
        row: its row number in the training data.
        score: in the unit of its ranking; finite.
        text: shown as it is, whitespace included.
        planted: whether it was planted to be found; ``None`` where nobody knows the sources.
        note: a few words to show beside it, such as ``"changed fact"``.
    """

    row: int
    score: float
    text: str
    planted: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise DataError(f"row {self.row} has the score {self.score}: only finite scores can be shown")


@dataclass(frozen=True)
class Ranking:
    """Texts in the order found, under a title. Bars of rankings with the same unit share their scale within a query."""

    title: str
    unit: str
    entries: tuple[Entry, ...]
    about: str = ""


@dataclass(frozen=True)
class ReportQuery:
    """A query with its rankings. Without a completion the whole text was measured, and ``prompt`` may be empty.

    >>> baker = Entry(7, 0.31, "Ada became a baker.", planted=True)
    >>> query = ReportQuery("Ada works as a", " baker", (Ranking("Proponents", "cosine", (baker,)),))
    """

    prompt: str
    completion: str
    rankings: tuple[Ranking, ...]

    @property
    def text(self) -> str:
        """Prompt and completion in one."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Detail:
    """A line of the header: a label and a value."""

    label: str
    value: str


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        title: the page's heading.
        model, data, method, run: what was asked, about which data, how, and the folder that holds the result.
        queries: in the order to show them.
        quality: figures of each method over all queries, where the sources are known.
        details: further lines of the header.
        about: a paragraph below the title for a reader who knows nothing yet.
    """

    title: str
    model: str
    data: str
    method: str
    run: str
    queries: tuple[ReportQuery, ...]
    quality: tuple[Quality, ...] = ()
    details: tuple[Detail, ...] = ()
    about: str = ""
