"""The options that run a command in several processes, and what becomes of the command then."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import click

from trace_cli._launch import RENDEZVOUS, Nodes, launch


def in_processes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command that several processes can share: it starts them, or is one of them, of which the first speaks."""

    @click.option(
        "--nproc-per-node",
        default="1",
        show_default=True,
        metavar="N|gpu",
        help="Processes a machine that share the work; gpu: one for each GPU.",
    )
    @click.option("--nnodes", default=1, show_default=True, help="Machines; start the same command on each.")
    @click.option("--node-rank", default=0, show_default=True, help="Which of them this is.")
    @click.option("--master-address", default="", metavar="HOST:PORT", help="Of machine 0, where there are several.")
    @click.option("--fsdp", is_flag=True, help="Spread the model over the processes, where it is too large for one.")
    @functools.wraps(function)
    def command(
        *arguments: Any, nproc_per_node: str, nnodes: int, node_rank: int, master_address: str, **options: Any
    ) -> None:
        context = click.get_current_context()
        nodes = Nodes(_count(nproc_per_node), nnodes, node_rank, master_address)
        if "RANK" not in os.environ and nodes.world > 1:
            sys.exit(launch(context.find_root().obj, nodes))
        if "RANK" in os.environ and RENDEZVOUS not in os.environ and nodes.world > 1:
            raise click.UsageError("torchrun has started the processes already: leave --nproc-per-node away")
        with _one_of_them():
            function(*arguments, **options)

    return command


def _count(text: str) -> int:
    if text == "gpu":
        from attribute.processes import gpus

        if not (found := gpus()):
            raise click.UsageError("--nproc-per-node gpu: there is no GPU here; say how many processes")
        return found
    if not text.isdigit():
        raise click.UsageError(f"--nproc-per-node is a number or gpu, not {text!r}")
    return int(text)


@contextmanager
def _one_of_them() -> Iterator[None]:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # without loading torch, so that bad usage is told at once
        yield
        return
    from attribute.processes import joined

    with joined() as here:
        if here.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
