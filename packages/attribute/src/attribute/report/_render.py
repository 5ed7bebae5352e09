"""A report as one HTML file: no scripts, nothing from elsewhere, everything escaped."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from attribute._errors import RunError
from attribute.methods.bm25 import words
from attribute.report._page import Ranking, Report, ReportQuery

SIGN = "A positive score means that training on the text lowers the query's loss; a negative one, that it raises it."
OPEN_AT_FIRST = 3  # queries unfolded when the page opens

# English words that are shared by chance and tell a reader nothing.
_COMMON = frozenset(
    words(
        "a about after all an and any are as at be been but by can could did do does for from had has have he her his "
        "how i if in into is it its me more most my no not of on one or our she so some than that the their them then "
        "there they this to was we were what when where which who will with would you your"
    )
)
_PIECES = re.compile(r"\w+|\W+")


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Write the page; the file appears only when it is complete.

    >>> write_report("runs/demo/report.html", report)
    PosixPath('runs/demo/report.html')

    Raises:
        RunError: the file cannot be written.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    page = render_report(report)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, as a cut-off byte sequence leaves it, has no UTF-8: better a question mark than no page.
        unfinished.write_text(page, encoding="utf-8", errors="replace")
        unfinished.replace(target)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to tell
            unfinished.unlink()
        raise RunError(f"the report cannot be written to {target}: {error.strerror}") from error
    return target


def render_report(report: Report) -> str:
    """The page as a string."""
    environment = Environment(
        loader=PackageLoader("attribute", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        report=report,
        sign=SIGN,
        open_at_first=OPEN_AT_FIRST,
        figure=figure,
        lead=lead,
        pieces=pieces,
        scale=scale,
        verdict=verdict,
    )


@dataclass(frozen=True)
class Piece:
    """A stretch of a text; ``shared`` is ``"completion"``, ``"prompt"`` or nothing, by where the query has the word."""

    text: str
    shared: str


def pieces(text: str, query: ReportQuery) -> list[Piece]:
    """The text cut at words, with those marked that the query uses too; common words are not marked.

    >>> query = ReportQuery("Ada works as a", " baker", ())
    >>> [piece.text for piece in pieces("A baker met Ada", query) if piece.shared]
    ['baker', 'Ada']
    """
    completion, prompt = _telling(query.completion), _telling(query.prompt)
    cut: list[Piece] = []
    for part in _PIECES.findall(text):
        word = part.casefold()
        shared = "completion" if word in completion else "prompt" if word in prompt else ""
        if cut and cut[-1].shared == shared == "":
            cut[-1] = Piece(cut[-1].text + part, "")
        else:
            cut.append(Piece(part, shared))
    return cut


def scale(ranking: Ranking, query: ReportQuery) -> float:
    """The largest score, without its sign, among the query's rankings of the same unit: a full bar."""
    return max(
        (abs(entry.score) for each in query.rankings if each.unit == ranking.unit for entry in each.entries),
        default=0.0,
    )


def figure(score: float) -> str:
    """A score in few characters, whatever its size.

    >>> figure(0.5512), figure(-12345.0)
    ('0.551', '−1.23e+04')
    """
    score += 0.0  # turns −0 into 0
    plain = score == 0 or 1e-2 <= abs(score) < 1e3
    return (f"{score:.3f}" if plain else f"{score:.2e}").replace("-", "−", int(score < 0))


def lead(completion: str) -> str:
    """The whitespace in front of a completion, which is not highlighted."""
    return completion[: len(completion) - len(completion.lstrip())]


def verdict(ranking: Ranking) -> str:
    """In a few words how well a ranking did, or nothing where the sources are unknown."""
    known = [entry.planted for entry in ranking.entries if entry.planted is not None]
    if not known:
        return ""
    return f"{sum(known)} of {len(known)} planted"


def _telling(text: str) -> set[str]:
    return set(words(text)) - _COMMON
