"""Every test that the page of invariants names exists, so that the page cannot go stale."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = sorted(
    set(re.findall(r"`(\w+)/(test_\w+)::(test_\w+)`", (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")))
)


def test_there_are_tests_named():
    assert len(NAMED) > 60


@pytest.mark.parametrize(("member", "file", "name"), NAMED)
def test_a_named_test_exists(member, file, name):
    (path,) = (ROOT / "packages" / member / "tests").rglob(f"{file}.py")
    known = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert name in known
