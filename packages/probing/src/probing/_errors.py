"""The errors of probing.

ProbingError
├── ConfigError     an option that does not exist, or two that cannot stand together
├── ReadoutError    a residual-stream readout the model does not have, or that fails its own check
├── SiteError       a mask site that matches nothing, or cannot carry the unit asked for
├── MaskError       masks of another model, a broken artefact, an ablation that is not defined
└── DataError       labels, token masks or rows that cannot be probed
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ProbingError(Exception):
    """Base class: every error probing raises on purpose is one of these."""


class ConfigError(ProbingError):
    """An option that does not exist, or two options that cannot stand together."""


class ReadoutError(ProbingError):
    """A readout the model does not have, or one that fails the residual-sum invariant."""


class SiteError(ProbingError):
    """A mask site that matches nothing, or a module that cannot carry the unit asked for."""


class MaskError(ProbingError):
    """Masks of another model, a broken artefact, or an ablation that is not defined here."""


class DataError(ProbingError):
    """Labels, token masks or rows that cannot be probed; the message names the count found and expected."""


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a misspelt option value, naming the close match.

    >>> check_choice("labeling", "sequence", ["sequence", "token"])
    """
    known = list(choices)
    if value in known:
        return
    close = get_close_matches(str(value), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(map(repr, known))}"
    raise ConfigError(f"{option}={value!r} is not known; {hint}")
