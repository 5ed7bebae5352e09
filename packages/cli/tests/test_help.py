"""Help is instant, complete and the same whichever way an option is spelt."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from trace_cli.main import _COMMANDS, cli

HEAVY = ("torch", "transformers", "datasets", "numpy", "rich", "attribute", "gradcore", "gradstore")


def commands() -> list[tuple[str, ...]]:
    """Every command and subcommand that there is."""
    found: list[tuple[str, ...]] = [()]
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in command.list_commands(context)]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_loads_nothing_heavy(command):
    """A tenth of a second of imports is all there is to `--help`."""
    code = f"""
import sys
from trace_cli.main import main
try:
    main([*{command!r}, "--help"])
except SystemExit as done:
    assert not done.code, done.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: trace" in done.stdout


def test_help_lists_every_command_that_exists_and_no_other(trace):
    printed = trace("--help").out
    for name, (_, line) in _COMMANDS.items():
        assert name in printed
        assert line.split(".")[0][:30] in printed
        assert cli.get_command(click.Context(cli), name) is not None


def test_bare_trace_prints_help(trace):
    assert trace().out == trace("--help").out == trace("-h").out


@pytest.mark.parametrize("command", [each for each in commands() if each], ids=" ".join)
def test_every_option_says_what_it_does(command):
    found: click.Command | None = cli
    for name in command:
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), name)
    assert found is not None
    assert found.help
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_version_is_printed(trace):
    result = trace("--version")
    assert (result.code, result.out) == (0, "trace, version 0.1.0\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["biuld", "x"], "Did you mean build?"),
        (["nonsense"], "No such command 'nonsense'"),
        (["build", "x", "--modle", "m"], "--model"),
        (["build"], "Missing argument 'RUN_PATH'"),
        (["build", "x", "--precision", "fp99"], "'fp99' is not one of 'fp32', 'bf16', 'fp16', 'int8', 'int4', 'auto'"),
        (["build", "x", "--projection-dim", "many"], "'many' is not a valid integer"),
        (["query"], "Missing option '--index'"),
        (["store", "inof"], "No such command 'inof'"),
        (["--config", "nothing.yaml"], "does not exist"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, trace):
    result = trace(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
