"""kill -9 at every step and at random moments: nothing finished is lost, and the final bytes are always the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from gradstore import verify

# One process forks a writer per trial, so that a trial costs milliseconds. A writer makes the store, or resumes it.
HARNESS = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from gradstore import StoreWriter

ROWS, WIDTH = 96, 8
rows = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
side = lambda a, b: {"loss": rows[a:b, 0], "tokens": np.arange(a, b), "sq_norm": (rows[a:b] ** 2).sum(1)}

def build(path, pause=0):
    known = (path / "manifest.json").exists()
    options = dict(rows=ROWS, columns={"a": 3, "b": 5}, dtype="fp16", rows_per_shard=16)
    writer = StoreWriter.resume(path, plan={"p": 1}) if known else StoreWriter.create(path, plan={"p": 1}, **options)
    with writer:
        if writer.data_pending:
            writer.write_data({"text": f"row {i}"} for i in range(ROWS))
        for shard, start, stop in random.sample(writer.pending, len(writer.pending)):
            time.sleep(pause)
            writer.write(shard, rows[start:stop], side(start, stop))

def crash_at(step):
    count = 0
    def guard(name):
        real = getattr(os, name)
        def call(*args):
            nonlocal count
            count += 1
            if count == step:
                if name == "write":  # a torn line
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else real(*args)  # only the order matters to a killed process, not the disk
        setattr(os, name, call)
    for name in ("fsync", "replace", "write", "ftruncate", "mkdir", "unlink"):
        guard(name)

def finished(path):
    journal = path / "journal.jsonl"
    if not (path / "manifest.json").exists() or not journal.exists():
        return {}
    lines = journal.read_bytes().split(b"\\n")[:-1]
    return {f: (path / f).stat().st_ino for f in (json.loads(line)["file"] for line in lines)}

def trial(path, prepare, kill_after=None, pause=0):
    before = finished(path)
    child = os.fork()
    if child == 0:
        prepare()
        build(path, pause)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    after = finished(path)
    lost = [f for f, inode in before.items() if after.get(f) != inode]  # same inode: not rewritten
    return {"killed": os.WIFSIGNALED(status), "code": status, "lost": lost, "finished": len(after)}

def read(path):
    return {p.relative_to(path).as_posix(): p.read_bytes().hex() for p in sorted(path.rglob("*")) if p.is_file()}

base, mode, trials = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
build(base / "whole")
whole, results = read(base / "whole"), []
for number in range(1, trials + 1):
    path = base / str(number)
    random.seed(number)
    if mode == "step":
        runs = [trial(path, lambda: crash_at(number))]
    elif mode == "twice":  # the resumed writer is killed too
        runs = [trial(path, lambda: crash_at(number)), trial(path, lambda: crash_at(1 + number * 7 % 31))]
    else:
        runs = [trial(path, lambda: None, random.uniform(0, 0.1), 0.02) for _ in range(2)]
    last = trial(path, lambda: crash_at(-1))
    results.append({"runs": runs, "last": last, "equal": read(path) == whole})
    if mode == "step" and not runs[0]["killed"]:
        break
print(json.dumps(results))
"""


def harness(path, mode: str, trials: int) -> list[dict]:
    command = [sys.executable, "-W", "error", "-c", HARNESS, path, mode, str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_nothing_lost(results: list[dict]) -> None:
    for number, result in enumerate(results, 1):
        assert result["last"]["code"] == 0, (number, result)
        assert result["equal"], (number, result)
        assert not any(run["lost"] for run in [*result["runs"], result["last"]]), (number, result)


def test_killed_at_every_step(tmp_path):
    results = harness(tmp_path, "step", 1000)
    assert_nothing_lost(results)
    assert not results[-1]["runs"][0]["killed"]  # the last trial had more steps than a build has, so each was tried
    assert len(results) > 60
    assert verify(tmp_path / "7").ok


def test_killed_twice(tmp_path):
    results = harness(tmp_path, "twice", 40)
    assert_nothing_lost(results)
    assert sum(run["killed"] for result in results for run in result["runs"]) > 40


def test_killed_at_random_moments(tmp_path):
    """24 stores, each killed up to twice; `GRADSTORE_KILLS=100` kills that many."""
    trials = int(os.environ.get("GRADSTORE_KILLS", "24"))
    results = harness(tmp_path, "random", trials)
    assert_nothing_lost(results)
    assert sum(run["killed"] for result in results for run in result["runs"]) >= trials * 0.8
    assert len({run["finished"] for result in results for run in result["runs"]}) > 3  # kills fell all over the build
