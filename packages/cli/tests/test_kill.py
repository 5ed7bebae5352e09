"""kill -9 of `trace build` at random moments, then the same command again: the same bytes in the end."""

from __future__ import annotations

import json
import subprocess
import sys

# One process loads what a build needs and forks the builds, so that a trial is cheap. Each fork is a whole
# `trace build`: options, model, tokens, gradients, store. Half of the kills fall anywhere in it, half amid its shards.
HARNESS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers.models.gpt_neox.modeling_gpt_neox
import attribute.index, trace_cli.commands.build
from trace_cli.main import main

base, options, trials = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])

def start(path):
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            main(["build", str(path), *options])
        except SystemExit as done:
            os._exit(done.code or 0)
    return child

def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def shards(path):
    return len(list(path.glob("shards/*.safetensors")))

def complete(path):
    manifest = path / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_bytes())["complete"]

def read(path):
    files = (each for each in sorted(path.rglob("*")) if each.is_file())
    return {each.relative_to(path).as_posix(): each.read_bytes().hex()
            for each in files if each.name not in ("config.yaml", "writer.lock")}

os.fsync = lambda _: None  # only the order matters to a killed process, not the disk
assert finish(start(base / "warm")) == 0
began = time.perf_counter()
assert finish(start(base / "whole")) == 0
seconds = time.perf_counter() - began
whole, results, killed = read(base / "whole"), [], 0
random.seed(0)
for number in range(3 * trials):
    path, kills = base / f"trial{number}", []
    for _ in range(1 + (number % 5 == 4)):  # the build that goes on is killed, too
        child = start(path)
        if number % 2:  # amid the shards, however fast the machine
            wanted = random.randint(1, 12)
            while shards(path) < wanted and not complete(path):
                time.sleep(0.0005)
            time.sleep(random.uniform(0, 0.003))
        else:
            time.sleep(seconds * random.uniform(0, 0.9))
        os.kill(child, signal.SIGKILL)
        kills.append({"code": finish(child), "shards": shards(path)})
    late = complete(path)  # the kill came too late: the run is finished, and refused
    again = finish(start(path))
    results.append({"kills": kills, "again": again, "late": late, "equal": read(path) == whole,
                    "left": sorted(each.name for each in base.glob(path.name + ".*"))})
    killed += not late
    if killed == trials:
        break
print(json.dumps({"seconds": seconds, "results": results}), file=sys.stderr)
"""


def test_a_build_killed_at_random_moments_is_continued_to_the_same_bytes(build_options, tmp_path):
    options = json.dumps([*build_options, "--rows-per-shard", "2"])
    command = [sys.executable, "-W", "error", "-c", HARNESS, str(tmp_path), options, "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stderr.splitlines()[-1])["results"]
    for result in results:
        assert result["again"] == (1 if result["late"] else 0), result
        assert result["equal"], result
        assert result["left"] == [], result
    assert sum(not result["late"] for result in results) == 20
    killed = [kill["shards"] for result in results for kill in result["kills"] if kill["code"] == -9]
    assert len(set(killed)) >= 4  # before the first shard, and between shards
