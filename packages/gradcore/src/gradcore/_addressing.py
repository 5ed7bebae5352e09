"""Module addressing: glob or regular-expression patterns over the dotted paths of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from gradcore._errors import SelectionError

REGEX_PREFIX = "re:"


def select_modules(
    model: nn.Module | Mapping[str, nn.Module] | Iterable[str] | Mapping[str, object],
    patterns: str | Sequence[str] | None = None,
    *,
    exclude: str | Sequence[str] = (),
    where: Callable[[str, nn.Module], bool] | None = None,
) -> list[str]:
    """Names of the modules that match any pattern, in the model's own order: a dry run that touches nothing.

    >>> from torch import nn
    >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> select_modules(mlp, ["0", "re:[12]"])
    ['0', '1', '2']
    >>> select_modules(mlp, "*", where=lambda name, module: isinstance(module, nn.Linear))
    ['0', '2']

    Args:
        model: the model, its modules by name, or just their names.
        patterns: shell globs (``"h.[012].attn"``, ``"*.mlp.*"``) matched against whole dotted names, where ``*`` also
            crosses dots; or regular expressions written ``"re:..."``, matched in full. ``None`` selects every module.
        exclude: patterns of the same kind whose matches are left out. They must match something, too.
        where: keep only modules for which this holds; needs a model, not bare names.

    Returns:
        Dotted names without the root module's empty one.

    Raises:
        SelectionError: a pattern matches no module (close matches are listed), a regular expression does not
            compile, or nothing is left.
    """
    given = dict(model.named_modules()) if isinstance(model, nn.Module) else model
    names = [name for name in given if name]
    modules: dict[str, nn.Module] = {}
    if where is not None:
        if isinstance(given, Mapping):
            modules = {name: each for name, each in given.items() if isinstance(each, nn.Module)}
        if not set(names) <= set(modules):
            raise SelectionError("`where` looks at modules, but only names were given: pass the model itself")

    candidates = [name for name in names if where is None or where(name, modules[name])]
    if patterns is None:
        chosen = set(candidates)
    else:
        chosen = _matched(patterns, candidates, names)
    chosen -= _matched(exclude, candidates, names)
    if not chosen:
        raise SelectionError(_nothing_left(patterns, exclude, len(names)))
    return [name for name in candidates if name in chosen]


def _matched(patterns: str | Sequence[str], candidates: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = _matcher(pattern)
        hits = {name for name in candidates if matches(name)}
        if not hits:
            unsuitable = [name for name in names if matches(name)]
            raise SelectionError(_no_match(pattern, candidates, unsuitable))
        found |= hits
    return found


def _matcher(pattern: str) -> Callable[[str], bool]:
    if not pattern.startswith(REGEX_PREFIX):
        return lambda name: fnmatchcase(name, pattern)
    try:
        compiled = re.compile(pattern.removeprefix(REGEX_PREFIX))
    except re.error as error:
        raise SelectionError(f"the regular expression {pattern!r} does not compile: {error}") from None
    return lambda name: compiled.fullmatch(name) is not None


def _no_match(pattern: str, candidates: Sequence[str], unsuitable: Sequence[str]) -> str:
    if unsuitable:
        shown = ", ".join(unsuitable[:5])
        return f"the pattern {pattern!r} matches only modules that cannot be used here: {shown}"
    close = get_close_matches(pattern, candidates, n=5, cutoff=0.4)
    # A whole prefix ("model.layers.0...") makes short patterns look unlike anything: try the tails as well.
    if not close:
        tails = {".".join(name.split(".")[-2:]): name for name in candidates}
        close = [tails[tail] for tail in get_close_matches(pattern, tails, n=5, cutoff=0.4)]
    shown = close or list(candidates[:5])
    if not shown:
        return f"the pattern {pattern!r} matches no module: the model has none that can be used here"
    lead = "did you mean" if close else "the names look like"
    return f"the pattern {pattern!r} matches no module; {lead}: {', '.join(shown)}?"


def _nothing_left(patterns: str | Sequence[str] | None, exclude: str | Sequence[str], total: int) -> str:
    if exclude:
        return f"exclude={exclude!r} removes every module that {patterns!r} selects"
    return f"no module is selected by {patterns!r} among the {total} modules of the model"
