"""``trace store``: info and verify."""

from __future__ import annotations

import json
from typing import Any

import click


@click.group("store")
def command() -> None:
    """Look at an index on disk, and check it."""


@command.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(path: str, as_json: bool) -> None:
    """What an index holds, without reading its rows."""
    from gradstore import info

    found = info(path).to_dict()
    click.echo(json.dumps(found) if as_json else _lines(found))


@command.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def verify(path: str, as_json: bool) -> None:
    """Read every byte: checksums, finite rows, counts. Exit code 1 if anything is wrong."""
    from gradstore import verify

    report = verify(path)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    elif report.ok:
        click.echo(f"{path}: {report.rows:,} rows in {report.files} files ({report.bytes:,} bytes) are right")
    else:
        click.echo("\n".join(report.problems))
    if not report.ok:
        raise click.exceptions.Exit(1)


def _lines(found: dict[str, Any]) -> str:
    width = max(map(len, found))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_value(value)}" for name, value in found.items())


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
