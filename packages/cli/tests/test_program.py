"""The program as its console script runs it: nothing printed, registered or refused is lost by the quick exit."""

import os
import subprocess
import sys

import pytest

_RUN = """
import atexit, sys
from trace_cli import _program

def main():
    atexit.register(print, "registered later")
    print("x" * 100_000)
    {body}

_program.main = main
_program.program()
"""


def _program(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _RUN.format(body=body)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit('why')", 1), ("raise ValueError('why')", 1)],
)
def test_output_handlers_and_code_survive_the_quick_exit(body, code):
    ended = _program(body)
    assert ended.returncode == code
    assert ended.stdout == "x" * 100_000 + "\nregistered later\n"
    assert ("why" in ended.stderr) == ("why" in body)


def test_module_and_wrong_usage():
    module = [sys.executable, "-m", "trace_cli"]
    shown = subprocess.run([*module, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert "trackstar" in shown.stdout
    refused = subprocess.run([*module, "biuld"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "Did you mean build?" in refused.stderr


def test_reader_that_leaves():
    reader = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m trace_cli --help | head -c 5"], capture_output=True, text=True, timeout=60
    )
    assert reader.stdout == "Usage"
    assert "Traceback" not in reader.stderr


@pytest.mark.parametrize(("to", "code", "said"), [(">&-", 0, ""), (">/dev/full", 1, "No space left on device")])
def test_output_that_goes_nowhere(to, code, said):
    script = """
import sys
from trace_cli import _program
_program.main = lambda: sys.stdout and sys.stdout.write("answer")
_program.program()
"""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["bash", "-c", f'"$1" -c "$2" {to}', "-", sys.executable, script]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=buffered)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert said in ended.stderr
    assert bool(ended.stderr) == bool(said)
