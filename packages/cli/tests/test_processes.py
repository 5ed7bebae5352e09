"""Commands in several processes: who speaks, what a dying process does to the others, and what is left of its run."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch.distributed as dist

from trace_cli import _launch
from trace_cli._launch import Nodes, launch

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

# As launch() would start them, but forked from one process that has loaded everything: a trial costs a second.
# `plan` says which process dies: killed, or with an error of its own, when it hands over its second shard.
HARNESS = """
import json, os, signal, subprocess, sys, time
import torch
torch.set_num_threads(1)
import transformers.models.gpt_neox.modeling_gpt_neox
import attribute.index, trace_cli.commands.build
from attribute import DataError
from gradstore import StoreWriter
from trace_cli import _launch
from trace_cli.main import main

class Forked:
    def __init__(self, pid):
        self.pid, self.code = pid, None
    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code
    def wait(self, timeout=1e9):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.01)
        return self.code
    def send_signal(self, number):
        os.kill(self.pid, number)

plan = {}

def dying(write):
    handed = []
    def later(self, shard, *rest):
        handed.append(shard)
        if len(handed) == 2:
            self.flush()
            if plan["how"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError("row 7 is odd")
        return write(self, shard, *rest)
    return later

def start(arguments, nodes, local, meet, folder):
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return Forked(child)
    os.environ |= {"RANK": str(local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(nodes.world),
                   _launch.RENDEZVOUS: meet}
    if local:
        out = os.open(os.devnull, os.O_WRONLY)
        err = os.open(str(folder / f"{local}.err"), os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1), os.dup2(err, 2)
    if plan.get("rank") == local:
        StoreWriter.write = dying(StoreWriter.write)
    try:
        main(list(arguments))
    except SystemExit as done:
        os._exit(done.code or 0)
    os._exit(99)

_launch._start = start
os.fsync = lambda _: None

def run(arguments):
    try:
        main(arguments)
    except SystemExit as done:
        return done.code

for trial in json.loads(sys.argv[1]):
    plan = trial["plan"]
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {trial['name']}", file=stream, flush=True)
    print(f"code {run(trial['arguments'])}", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def trials(build_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of one and three processes; of three of which one is killed or fails, each begun again."""
    root = tmp_path_factory.mktemp("trials")

    def build(name: str, run: str, count: int, **plan: object) -> dict[str, Any]:
        options = [*build_options, "--rows-per-shard", "2", "--nproc-per-node", str(count)]
        return {"name": name, "plan": plan, "arguments": ["build", str(root / run), *options]}

    todo = [
        build("alone", "alone", 1),
        build("whole", "whole", 3),
        build("killed", "killed", 3, rank=1, how="kill"),
        build("killed, again", "killed", 2),
        build("failed", "failed", 3, rank=2, how="raise"),
        build("failed, again", "failed", 1),
        build("first failed", "first", 2, rank=0, how="raise"),
        build("finished", "whole", 2),
    ]
    command = [sys.executable, "-W", "error", "-c", HARNESS, json.dumps(todo)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = {"root": root}
    for stream in ("stderr", "stdout"):
        for part in getattr(done, stream).split("=== ")[1:]:
            name, _, text = part.partition("\n")
            found.setdefault(name, {})[stream] = text
    return found


def code(trial: dict[str, str]) -> int:
    return int(trial["stderr"].splitlines()[-1].removeprefix("code "))


def errors(trial: dict[str, str]) -> list[str]:
    return [line for line in trial["stderr"].splitlines() if not line.startswith(("·", "code"))]


@needs_gloo
def test_three_processes_speak_with_one_voice_and_write_one_store(trials, contents):
    assert (code(trials["alone"]), code(trials["whole"])) == (0, 0)
    for stream, border in (("stdout", " ("), ("stderr", " in ")):  # the rest of a line are seconds
        said = [trials[name][stream].replace(f"/{name}", "/RUN").splitlines() for name in ("alone", "whole")]
        assert [line.partition(border)[0] for line in said[0]] == [line.partition(border)[0] for line in said[1]]
    assert contents(trials["root"] / "whole") == contents(trials["root"] / "alone")
    assert (trials["root"] / "whole" / "config.yaml").exists()


@needs_gloo
def test_a_killed_process_stops_the_run_and_the_rest_is_kept(trials, contents):
    assert code(trials["killed"]) == 128 + 9
    assert errors(trials["killed"]) == ["error: process 1 of 3 was ended by SIGKILL (out of memory?)"]
    assert code(trials["killed, again"]) == 0
    assert "continuing" in trials["killed, again"]["stderr"]
    assert contents(trials["root"] / "killed") == contents(trials["root"] / "alone")


@needs_gloo
def test_the_error_of_a_process_is_the_only_one_and_its_shards_are_kept(trials, contents):
    assert code(trials["failed"]) == 1
    assert errors(trials["failed"]) == ["error: row 7 is odd"]
    assert code(trials["failed, again"]) == 0
    assert "continuing" in trials["failed, again"]["stderr"]
    assert contents(trials["root"] / "failed") == contents(trials["root"] / "alone")


@needs_gloo
def test_an_error_of_the_first_process_is_told_once(trials):
    assert code(trials["first failed"]) == 1
    assert errors(trials["first failed"]) == ["error: row 7 is odd"]
    assert code(trials["finished"]) == 1
    (said,) = errors(trials["finished"])
    assert "finished run already" in said


def test_the_program_can_be_started_as_a_module():
    done = subprocess.run([sys.executable, "-m", "trace_cli", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[0]) == (0, "trace,")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nproc-per-node", "0"], "start at 1"),
        (["--nproc-per-node", "many"], "a number or gpu"),
        (["--nnodes", "2"], "--master-address HOST:PORT"),
        (["--nnodes", "2", "--node-rank", "2", "--master-address", "a:1"], "at most 1"),
        (["--master-address", "a:1"], "--nnodes says how many"),
    ],
)
def test_numbers_of_processes_that_cannot_be(trace, build_options, tmp_path, options, said):
    done = trace("build", tmp_path / "run", *build_options, *options)
    assert done.code == 2
    assert said in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()


def test_torchrun_and_nproc_exclude_each_other(trace, build_options, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    done = trace("build", tmp_path / "run", *build_options, "--nproc-per-node", 2)
    assert done.code == 2
    assert "leave --nproc-per-node away" in done.err


def test_the_ranks_of_a_machine_follow_those_before_it(monkeypatch):
    started = []

    class Done:
        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            started.append((env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env[_launch.RENDEZVOUS], command[-4:]))

        def poll(self) -> int:
            return 0

        def wait(self, timeout: float | None = None) -> int:
            return 0

    monkeypatch.setattr(_launch.subprocess, "Popen", Done)
    assert launch(["build", "x"], Nodes(2, 3, 1, "first:29500")) == 0
    meet = "tcp://first:29500"
    program = ["-m", "trace_cli", "build", "x"]
    assert started == [("2", "0", "6", meet, program), ("3", "1", "6", meet, program)]
