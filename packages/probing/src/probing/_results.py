"""What a command found: numbers in JSON, a short line each for people. Importing this module does not import torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class Kept:
    """A number of units out of all.

    >>> str(Kept(80, 160)), plain(Kept(80, 160))
    ('80 of 160', {'kept': 80, 'of': 160})
    """

    kept: int
    of: int

    def __str__(self) -> str:
        return f"{self.kept} of {self.of}"


@dataclass(frozen=True)
class Undefined:
    """A figure that does not exist, and why; null in JSON."""

    reason: str = ""

    def __str__(self) -> str:
        return f"undefined: {self.reason}" if self.reason else "undefined"


def plain(value: Any) -> Any:
    """The value as JSON has it: estimates as mean, low and high, what is undefined as null.

    A mapping gets an entry ``undefined`` with the reasons, if there are any.
    """
    if isinstance(value, Mapping):
        found = {str(name): plain(item) for name, item in value.items()}
        reasons = {str(k): v.reason for k, v in value.items() if isinstance(v, Undefined) and v.reason}
        return found | ({"undefined": reasons} if reasons else {})
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Kept):
        return {"kept": value.kept, "of": value.of}
    if hasattr(value, "mean") and hasattr(value, "high"):
        return {name: plain(getattr(value, name)) for name in ("mean", "low", "high")}
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return None if isinstance(value, Undefined) else value


def as_json(result: Mapping[str, Any]) -> str:
    """A result as the text of a JSON file."""
    return json.dumps(plain(result), indent=2, allow_nan=False)


def as_text(value: Any) -> str:
    """The value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(round(value, 4) if isinstance(value, float) else value)


def show(result: Mapping[str, Any], *, json_wanted: bool) -> None:
    """Print a result as lines, or as JSON."""
    if json_wanted:
        click.echo(as_json(result))
        return
    width = max(map(len, result))
    for name, value in result.items():
        click.echo(f"{name:<{width}}  {as_text(value)}")


def show_table(results: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a line a variable."""
    lines = [
        ("variable", *columns),
        *((name, *(as_text(each[at]) for at in columns)) for name, each in results.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())
