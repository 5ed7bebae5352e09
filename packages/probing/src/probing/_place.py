"""Which token of a text is probed: by index, or the last one of a word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from probing._errors import DataError
from probing._table import Table


class Position:
    """Which token of each row is probed; ``"last"`` is `last_token_mask`'s."""

    def __init__(self, rule: str, table: Table) -> None:
        self._places, self._words, self._index = table.places, None, 0
        if rule.startswith("word:"):
            self._words = [str(value) for value in table.column(rule.removeprefix("word:"))]
        elif rule != "first":
            try:
                self._index = int(rule)
            except ValueError:
                raise DataError(
                    f"--position {rule!r} is no rule; write last, first, a token index, or word:COLUMN"
                ) from None

    def of(self, number: int, encoded: Any, text: str) -> int:
        """The index of the probed token."""
        place, length = self._places[number], len(encoded["input_ids"])
        if self._words is not None:
            return _last_token_of(self._words[number], text, encoded["offset_mapping"], place)
        if not -length <= self._index < length:
            raise DataError(f"{place} has {length} tokens, so there is no position {self._index}")
        return self._index % length


def _last_token_of(word: str, text: str, offsets: Sequence[tuple[int, int]], place: str) -> int:
    start = find_word(text, word)
    if start is None:
        raise DataError(f"{place}: {word!r} does not occur as a whole word in {text!r}")
    end = start + len(word)
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not inside or max(b for _, b in offsets) < end:
        raise DataError(f"{place}: the word {word!r} lies behind the tokens kept; type a larger --max-length")
    return inside[-1]


def find_word(text: str, word: str) -> int | None:
    """Where a word first stands as a whole: not between letters, digits or marks that go on.

    >>> find_word("This king is wise", "is"), find_word("This king", "is")
    (10, None)

    Chinese and Japanese leave no space between words, so there any occurrence counts.
    """
    for match in re.finditer(f"(?={re.escape(word)})", text):
        start, end = match.start(), match.start() + len(word)
        if not _goes_on(text[start - 1 : start], word[:1]) and not _goes_on(word[-1:], text[end : end + 1]):
            return start
    return None


def _goes_on(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    return all(char and _in_word(char) for char in (left, right))


def _in_word(char: str) -> bool:
    wide = unicodedata.east_asian_width(char) in "WF"
    return not wide and (char.isalnum() or char == "_" or unicodedata.category(char).startswith("M"))
