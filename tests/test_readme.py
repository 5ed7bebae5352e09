"""What the README tells a stranger to type exists and parses."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from trace_cli.main import SETTINGS, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "packages").glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """Page and words of every `trace …` in a shell block, the ends of pipes and `&&` apart."""
    found: list[tuple[str, list[str]]] = []
    for page in PAGES:
        for block in blocks(page, "(?:bash|sh|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|", line.removeprefix("$ ")):
                    words = shlex.split(part, comments=True)
                    words = words[2:] if words[:2] == ["uv", "run"] else words
                    if words[:1] == ["trace"]:
                        found.append((page.relative_to(ROOT).as_posix(), words[1:]))
    return found


def test_there_are_commands_to_check():
    assert any(page == "README.md" for page, _ in commands())


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_commands_parse(page, words, monkeypatch):
    """Every command, option and value; paths and files need not exist."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: value)
    command: click.Command = cli
    context = click.Context(cli, info_name="trace", **SETTINGS)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"{page}: trace has no {name!r}"
        command, parent = found, context
        context = click.Context(found, info_name=name, parent=parent)
    if isinstance(command, click.Group):
        assert command is cli, f"{page}: {' '.join(words)} runs nothing"
        assert rest[:1] == ["--config"], f"{page}: {' '.join(words)}"
        return
    command.make_context(command.name, rest, parent=context.parent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_are_python_of_ours(page):
    """They parse, and the names they take from our packages exist."""
    import importlib

    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in ("gradcore", "gradstore", "attribute", "probing"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_ci_runs_what_the_readme_says():
    (command,) = [block.strip() for block in blocks(ROOT / "README.md", "bash") if "pytest" in block]
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command
