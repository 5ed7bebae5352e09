"""Command-line options out of dataclass fields: names, types, defaults and help stand in one place, the dataclass."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click


class Command(click.Command):
    """A command whose list options take several values, ``--layers 16 24``, and whose flags take ``True`` or ``False``.

    Options are written with underscores or dashes alike.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {"token_normalize_func": lambda name: name.replace("-", "_"), "show_default": True}
        super().__init__(*args, context_settings=settings, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite to click's own spelling first."""
        return super().parse_args(ctx, list(self._spelled_out(args)))

    def _spelled_out(self, args: list[str]) -> Iterator[str]:
        known = {name: p for p in self.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)}
        place = 0
        while place < len(args):
            word = args[place]
            place += 1
            option = known.get(f"--{word[2:].replace('-', '_')}") if word.startswith("--") else None
            if option is not None and option.multiple:
                while place < len(args) and not args[place].startswith("-"):
                    yield from (word, args[place])
                    place += 1
            elif (
                option is not None and option.is_flag and place < len(args) and args[place].lower() in ("true", "false")
            ):
                yes = args[place].lower() == "true"
                yield option.opts[0] if yes or not option.secondary_opts else option.secondary_opts[0]
                place += 1
            else:
                yield word


def options_from(cls: type, skip: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator adding one option per field, in order, helped by the string under the field."""
    helps, hints = field_docs(cls), get_type_hints(cls)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for f in reversed([f for f in fields(cls) if f.name not in skip]):
            function = _option(f, hints[f.name], helps.get(f.name, ""))(function)
        return function

    return decorate


def field_docs(cls: type) -> dict[str, str]:
    """The string literals under a dataclass' fields."""
    (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for above, below in zip(tree.body, tree.body[1:]):
        named = isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name)
        if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[above.target.id] = str(below.value.value)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _option(f: Field[Any], hint: Any, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    default = f.default if f.default is not MISSING else None
    name = f"--{f.name}"
    if hint is bool:
        return click.option(f"{name}/--no_{f.name}", default=default, help=text)
    if get_origin(hint) is tuple:
        shown = " ".join(map(str, default)) if default else None
        kind = get_args(hint)[0]
        return click.option(name, type=kind, multiple=True, default=default, help=text, show_default=shown or False)
    if get_origin(hint) is Literal:
        return click.option(name, type=click.Choice(get_args(hint)), default=default, help=text)
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return click.option(name, type=hint, default=default, help=text)


def parse_assignments(text: str, option: str = "--data_args") -> dict[str, Any]:
    """``"a=1,b=x"`` as keyword arguments; numbers, True, False and None are read as such.

    >>> parse_assignments("name=en,n=3,streaming=True")
    {'name': 'en', 'n': 3, 'streaming': True}
    """
    found: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"{option}: {part!r} is not of the form name=value")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
