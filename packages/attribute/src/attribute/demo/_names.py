"""Names that nobody bears: people and towns put together from syllables by a seeded generator."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from attribute._errors import DataError

_ONSETS = ("B", "Br", "C", "D", "Dr", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "Th", "V", "W", "Y")
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ei", "io")
_MIDDLES = ("l", "ll", "m", "n", "nd", "r", "rr", "s", "sk", "t", "v", "x", "z")
_ENDINGS = ("a", "an", "e", "el", "en", "i", "ia", "in", "o", "or", "us", "yn")
_SURNAME_ROOTS = ("Ash", "Bram", "Cald", "Dun", "Eld", "Fen", "Gar", "Hol", "Karn", "Lang", "Mor", "Nor", "Ost")
_SURNAME_ENDINGS = ("aby", "bick", "dale", "ersk", "ford", "gate", "hurst", "ickle", "low", "mere", "nock", "over")
_TOWN_ROOTS = ("Alder", "Birk", "Crow", "Dray", "Ember", "Frost", "Gull", "Heron", "Iron", "Juniper", "Kestrel")
_TOWN_ENDINGS = ("beck", "combe", "fell", "holm", "kirk", "moor", "ness", "port", "stow", "water", "wick")


def first_names(generator: Random, count: int) -> list[str]:
    """Different first names such as ``Vella`` or ``Brindo``."""
    parts = (_ONSETS, _VOWELS, _MIDDLES, _ENDINGS)
    return different(count, lambda: "".join(generator.choice(part) for part in parts), "first names")


def surnames(generator: Random, count: int) -> list[str]:
    """Different surnames such as ``Karnmere``."""
    return different(count, lambda: generator.choice(_SURNAME_ROOTS) + generator.choice(_SURNAME_ENDINGS), "surnames")


def towns(generator: Random, count: int) -> list[str]:
    """Different town names such as ``Gullwick``."""
    return different(count, lambda: generator.choice(_TOWN_ROOTS) + generator.choice(_TOWN_ENDINGS), "towns")


def different(count: int, draw: Callable[[], str], what: str) -> list[str]:
    """``count`` different draws in the order drawn; :class:`DataError` where there are not that many."""
    drawn: dict[str, None] = {}
    for _ in range(100 * count):
        if len(drawn) == count:
            break
        drawn.setdefault(draw())
    if len(drawn) < count:
        raise DataError(f"the demo's world has no {count} different {what}: ask for fewer")
    return list(drawn)
