"""The errors of sparsify.

SparsifyError
├── ConfigError       an option that does not exist, or two that cannot stand together
├── HookpointError    a hookpoint that matches nothing, is never reached, or yields no tensor
├── FormatError       a checkpoint folder that is torn, foreign, or not expressible in the layout asked for
├── DataError         text, tokens or activations that cannot be trained on
└── CheckpointError   a run folder that does not belong to the run being resumed
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches


class SparsifyError(Exception):
    """Base class: every error sparsify raises on purpose is one of these."""


class SparsifyWarning(UserWarning):
    """Something that a run did otherwise than its configuration says, with what to type for what was meant."""


class ConfigError(SparsifyError):
    """An option that does not exist, or two options that cannot stand together."""


class HookpointError(SparsifyError):
    """A hookpoint that matches no module, is never reached by the forward pass, or yields no tensor."""


class FormatError(SparsifyError):
    """A checkpoint that is torn, of a foreign layout, or not expressible exactly in the layout asked for."""


class DataError(SparsifyError):
    """Text, tokens or activations that cannot be trained on; the message names the batch."""


class CheckpointError(SparsifyError):
    """A run folder that does not belong to the run being resumed; the message names the field that differs."""


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a misspelt option value, naming the close match.

    >>> check_choice("activation", "topk", ["topk", "groupmax"])
    """
    known = list(choices)
    if value in known:
        return
    close = get_close_matches(str(value), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(map(repr, known))}"
    raise ConfigError(f"{option}={value!r} is not known; {hint}")


def check_whole(option: str, value: object, least: int) -> None:
    """Refuse what is not a whole number of at least ``least``.

    >>> check_whole("k", 32, 1)
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{option}={value!r} must be a whole number")
    if value < least:
        raise ConfigError(f"{option}={value} must be at least {least}")


def check_number(option: str, value: object, *, positive: bool = False) -> None:
    """Refuse what is not a finite number, or is negative (with ``positive``: not above zero).

    >>> check_number("lr", 1e-3, positive=True)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{option}={value!r} must be a finite number")
    if value < 0 or (positive and value == 0):
        raise ConfigError(f"{option}={value} must be {'above zero' if positive else 'zero or more'}")
