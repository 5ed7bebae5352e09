"""What was run, as a file that runs it again: ``config.yaml`` in every run folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

NAME = "config.yaml"


def save_config(folder: str | Path, command: str) -> None:
    """Write the current command's parameters, defaults included, so that a later default changes nothing."""
    import yaml

    if int(os.environ.get("RANK", "0")):  # the first of several processes writes it
        return
    context = click.get_current_context()
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in context.params.items()}
    # Replacing what was there is no part of what was run: an interrupted run is continued, not replaced again.
    kept = {name: value for name, value in options.items() if value is not None and name != "overwrite"}
    saved = {"command": command, "options": kept}
    (Path(folder) / NAME).write_text(yaml.safe_dump(saved, sort_keys=False, allow_unicode=True), encoding="utf-8")


def replay(context: click.Context, file: str) -> Any:
    """Run the command of a saved configuration."""
    import yaml

    try:
        saved = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        name, options = saved["command"], dict(saved["options"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise click.ClickException(f"{file} is no configuration of trace: {error}") from error
    group = context.command
    assert isinstance(group, click.Group)
    command = group.get_command(context, name)
    if command is None:
        raise click.ClickException(f"{file} names the command {name!r}, which this version does not have")
    known = {parameter.name for parameter in command.params}
    if unknown := sorted(set(options) - known):
        raise click.ClickException(f"{file}: {name} has no option {', '.join(unknown)}")
    with command.make_context(name, [], parent=context, resilient_parsing=True) as inner:
        inner.resilient_parsing = False
        for parameter in command.params:
            if parameter.required and options.get(str(parameter.name)) is None:
                raise click.MissingParameter(ctx=inner, param=parameter)
            if parameter.name in options:
                # As if typed: a hand-edited file is checked like a command line.
                inner.params[parameter.name] = parameter.process_value(inner, options[parameter.name])
        return command.invoke(inner)
