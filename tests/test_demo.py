"""What a newcomer types first, from an empty cache: the demo, the demo again, an index without options, a question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRACE = [sys.executable, "-c", "from trace_cli.main import main; main()"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("newcomer")


def trace(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRACE_CACHE": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*TRACE, *arguments], cwd=home, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def first(home):
    return trace(home, "demo", "--json")


def test_the_planted_texts_are_found_and_word_counting_goes_astray(first, home):
    found = json.loads(first.stdout)
    quality = {each["method"]: each for each in found["quality"]}
    assert quality["grad-cos"]["mrr"]["mean"] > 0.95
    assert quality["BM25"]["mrr"]["mean"] < 0.5
    assert "train:" in first.stderr
    assert (home / found["page"]).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_second_time_the_model_is_there_already_and_the_figures_are_the_same(first, home):
    again = trace(home, "demo", "--json")
    assert "train:" not in again.stderr
    assert json.loads(again.stdout) == json.loads(first.stdout)
    shown = trace(home, "demo")
    assert "planted" in shown.stdout
    assert "grad-cos" in shown.stdout


def test_build_without_options_takes_the_demos_inputs_and_can_be_asked(first, home):
    trace(home, "build", "runs/default")
    record = json.loads(Path(next((home / "runs/default/data").glob("*.jsonl"))).read_text().splitlines()[7])
    answer = json.loads(trace(home, "query", "--index", "runs/default", "--text", record["text"], "--json").stdout)
    best = answer["queries"][0]["proponents"][0]
    assert best["text"] == record["text"]
    assert best["score"] == pytest.approx(1, abs=1e-4)
