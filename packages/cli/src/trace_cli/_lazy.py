"""A click group that knows its commands by name and imports one only when it runs."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """Each command is the object named ``command`` in its module, or the one that ``module:object`` names.

    Args:
        commands_at: command name → (where, one line of help).
    """

    def __init__(self, *args: Any, commands_at: dict[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*args, **options)
        self._commands_at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(self._commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in self._commands_at:
            return None
        module, _, name = self._commands_at[cmd_name][0].partition(":")
        return getattr(import_module(module), name or "command")

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Like click's own, with close matches for a misspelt command."""
        name = args[0]
        if name not in self._commands_at and any(each.split("=")[0] in ("--model", "--dataset") for each in args):
            args = ["build", *args]  # trace RUN_PATH --model … --dataset …, as Bergson once had it
            name = "build"
        if name not in self._commands_at and (close := get_close_matches(name, self._commands_at)):
            ctx.fail(f"No such command {name!r}. Did you mean {', '.join(close)}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in the help, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._commands_at[name][1]) for name in self.list_commands(ctx)])
