"""Starting the processes of a run: the same command once for each, and one message where one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import click

RENDEZVOUS = "TRACE_RENDEZVOUS"  # as in attribute.processes, which this must not import: it loads torch
PEER_LOST = 75  # attribute.PeerLost.exit_code
_GRACE = 2.0  # seconds for the others to end by themselves once one has died


@dataclass(frozen=True)
class Nodes:
    """How many processes, and which of them are this machine's.

    Attributes:
        each: processes a machine.
        count, number: machines, and which this one is.
        address: ``host:port`` of machine 0, where there are several.
    """

    each: int = 1
    count: int = 1
    number: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        if self.each < 1 or self.count < 1:
            raise click.UsageError("--nproc-per-node and --nnodes start at 1")
        if not 0 <= self.number < self.count:
            raise click.UsageError(
                f"--node-rank counts from 0: with --nnodes {self.count} it is at most {self.count - 1}"
            )
        host, _, port = self.address.rpartition(":")
        if self.count > 1 and not (host and port.isdigit()):
            raise click.UsageError(
                "several machines meet at the first: --master-address HOST:PORT, the same on each of them"
                + (f" (not {self.address!r})" if self.address else "")
            )
        if self.count == 1 and self.address:
            raise click.UsageError("--master-address is for several machines: --nnodes says how many")

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.each * self.count


def launch(arguments: Sequence[str], nodes: Nodes) -> int:
    """Run the command in this machine's processes; the exit code is that of the first to die, or 0."""
    with TemporaryDirectory(prefix="trace-") as folder:
        meet = f"tcp://{nodes.address}" if nodes.count > 1 else f"file://{folder}/meet"
        running = [_start(arguments, nodes, local, meet, Path(folder)) for local in range(nodes.each)]

        def stop(number: int, _: FrameType | None) -> None:
            raise SystemExit(128 + number)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            codes = _wait(running)
        except KeyboardInterrupt:  # the terminal has told every process
            _end(running, patience=_GRACE)
            raise
        finally:
            _end(running, patience=0)
            signal.signal(signal.SIGTERM, before)
        return _report(codes, nodes, Path(folder))


def _start(arguments: Sequence[str], nodes: Nodes, local: int, meet: str, folder: Path) -> subprocess.Popen[bytes]:
    rank = nodes.number * nodes.each + local
    threads = max(1, (os.cpu_count() or 1) // nodes.each)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(nodes.world),
        RENDEZVOUS: meet,
    }
    command = [sys.executable, *_warnings(), "-m", "trace_cli", *arguments]
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with (folder / f"{rank}.err").open("wb") as errors:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        )


def _warnings() -> list[str]:
    return [f"-W{option}" for option in sys.warnoptions]


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes when all have ended; those of the others are 0 where one died and they had to be ended."""
    while all(process.poll() in (None, 0) for process in running):
        if all(process.poll() == 0 for process in running):
            return [0] * len(running)
        time.sleep(0.05)
    until = time.monotonic() + _GRACE
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        time.sleep(0.05)
    return [process.poll() or 0 for process in running]


def _end(running: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Let them end, then ask them to, then end them."""
    for wait, send in ((patience, signal.SIGTERM), (5.0, signal.SIGKILL)):
        until = time.monotonic() + wait
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(send)
    for process in running:
        process.wait()


def _report(codes: Sequence[int], nodes: Nodes, folder: Path) -> int:
    """Say what the process that died has to say; the first has said so itself."""
    ranks = {nodes.number * nodes.each + local: code for local, code in enumerate(codes) if code}
    if not ranks:
        return 0
    own = {rank: code for rank, code in ranks.items() if code != PEER_LOST}
    if not own:
        click.echo("error: a process on another machine ended too early: its message is there", err=True)
        return PEER_LOST
    rank, code = min(own.items())
    if code < 0:
        name = signal.Signals(-code).name
        why = " (out of memory?)" if name == "SIGKILL" else ""
        click.echo(f"error: process {rank} of {nodes.world} was ended by {name}{why}", err=True)
        return 128 - code
    if rank:
        said = (folder / f"{rank}.err").read_text(encoding="utf-8", errors="replace").strip()
        click.echo(said or f"error: process {rank} of {nodes.world} ended with code {code}", err=True)
    return code
