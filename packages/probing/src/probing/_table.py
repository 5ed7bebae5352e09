"""Rows with named columns from a file, each with its place there, so that a message can name it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from probing._errors import DataError


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    >>> Table.of([{"text": "the cat", "number": "sg"}]).column("number")
    ['sg']

    Attributes:
        name: the file, for messages.
        rows: one dictionary a row.
        places: where each row stands: ``"rows.csv, row 7 (line 8)"``.
    """

    name: str
    rows: list[dict[str, Any]]
    places: list[str]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]] | Table, name: str = "the data") -> Table:
        """Rows made in Python, numbered from 1; a table as it is."""
        if isinstance(rows, Table):
            return rows
        return cls(name, list(rows), [f"{name}, row {number}" for number in range(1, len(rows) + 1)])

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> Table:
        """Only these rows, in this order."""
        return Table(self.name, [self.rows[i] for i in rows], [self.places[i] for i in rows])

    def column(self, name: str) -> list[Any]:
        """One column of all rows.

        Raises:
            DataError: no row has it, and close matches are named; or a row has no value in it.
        """
        self._require(name)
        for row, place in zip(self.rows, self.places):
            if _absent(row.get(name)):
                raise DataError(
                    f"{place}: no value in column {name!r}; fill it in, or leave such rows out with --missing skip"
                )
        return [row[name] for row in self.rows]

    def complete(self, columns: Sequence[str]) -> Table:
        """The rows that have a value in each of these columns.

        Raises:
            DataError: no row has such a column, or no row has values in all of them.
        """
        for name in columns:
            self._require(name)
        kept = [i for i, row in enumerate(self.rows) if not any(_absent(row.get(name)) for name in columns)]
        if not kept:
            raise DataError(f"{self.name}: no row has a value in each of the columns {', '.join(columns)}")
        return self.take(kept)

    def _require(self, name: str) -> None:
        known = list(dict.fromkeys(key for row in self.rows for key in row))
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise DataError(f"{self.name}: no column {name!r}; {hint}")


def _absent(value: Any) -> bool:
    """An empty cell, a null, or pandas' NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def read_table(path: str | Path) -> Table:
    """Rows of a .jsonl, .json (a list), .csv or .tsv file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: an unknown ending, another encoding, a broken line, or no rows.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in _READERS:
        raise DataError(
            f"{path}: rows are read from .jsonl, .json, .csv or .tsv, not {ending or 'a file without ending'}"
        )
    rows, places = [], []
    for number, (line, row) in enumerate(_READERS[ending](path, _text(path)), 1):
        place = f"{path}, row {number}" + (f" (line {line})" if line not in (None, number) else "")
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row is an object with named columns, found {json.dumps(row)[:60]}")
        rows.append(row)
        places.append(place)
    if not rows:
        raise DataError(f"{path}: expected rows with named columns and found none")
    return Table(str(path), rows, places)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, found = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(
            f"{path}, line {line}: byte 0x{found:02x} is not UTF-8; save the file as UTF-8, for example with "
            f"iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}"
        ) from None


def _jsonl(path: Path, text: str) -> Iterator[tuple[int | None, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would break a line at an unescaped U+2028
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error})") from None


def _json(path: Path, text: str) -> Iterator[tuple[int | None, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); one object a line is a .jsonl file") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {json.dumps(rows)[:60]}")
    yield from ((None, row) for row in rows)


def _delimited(path: Path, text: str, delimiter: str) -> Iterator[tuple[int | None, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = cells
                if twice := sorted({name for name in header if header.count(name) > 1}):
                    raise DataError(f"{path}: the header names {twice[0]!r} twice; rename one of the columns")
            elif len(cells) > len(header):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells under {len(header)} column names; put cells that "
                    f"contain {'a comma' if delimiter == ',' else 'a tab'} in double quotes"
                )
            elif cells:
                yield line, dict(zip(header, cells + [""] * (len(header) - len(cells))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: {error}; is a quotation mark open, or not doubled?") from None


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": lambda path, text: _delimited(path, text, ","),
    ".tsv": lambda path, text: _delimited(path, text, "\t"),
}
