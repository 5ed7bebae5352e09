"""What the benchmarks share: shapes with random weights, real text, medians of interleaved repetitions."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the program does


def assets() -> Path:
    """The folder of real texts and tokenizers, from TRACE_ASSETS or beside the repository."""
    found = Path(os.environ.get("TRACE_ASSETS", Path(__file__).resolve().parents[2] / "shared" / "assets"))
    if not found.is_dir():
        raise SystemExit("these benchmarks read real text: set TRACE_ASSETS to a folder with text/ and tokenizers/")
    return found


def articles(count: int) -> list[str]:
    """The first WikiText-2 articles of validation and test."""
    text = "\n".join((assets() / "text" / f"wikitext2-{part}.txt").read_text() for part in ("valid", "test"))
    found = [part.strip() for part in re.split(r"\n (?== [^=]+ = \n)", text)]
    return [part for part in found if len(part) > 200][:count]


def interleaved(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each action, run in turns so that a noisy minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}
