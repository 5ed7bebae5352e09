"""The table of promises names tests that exist, and says what else it leans on."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = HERE.parents[2] / "docs" / "sparsify-invariants.md"


@pytest.mark.skipif(not TABLE.is_file(), reason="the tests run without the repository's docs")
def test_every_promise_names_tests_that_exist():
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in HERE.glob("test_*.py")), re.M))
    rows = [line for line in TABLE.read_text().splitlines() if re.match(r"\| (?!---|promise|issue)", line)]
    assert len(rows) >= 40
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, set(named) - defined
