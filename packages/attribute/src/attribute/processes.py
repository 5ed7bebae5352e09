"""The processes that share a run, or the only one: what each does, and sums over all of them.

Work is planned the same way whatever their number, and whole shards or batches are dealt out: a row's gradient depends
in its last bits on the batch it is in, and stores come out equal to the byte only if batches do.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attribute._errors import PeerLost

T = TypeVar("T")

RENDEZVOUS = "TRACE_RENDEZVOUS"
"""Environment variable: where processes that ``trace --nproc-per-node`` started meet; torchrun's meet at env://."""
_PATIENCE = timedelta(days=7)  # the first process may tokenise for hours; the death of another is noticed at once


@dataclass(frozen=True)
class Processes:
    """One process among those that share a run. Alone, every operation is the identity.

    Attributes:
        rank: number of this one, from 0.
        world: how many there are.
        local: number of this one on its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this one reads the data, makes the folders and speaks to the person."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1))

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, in all of them; elsewhere it is not called."""
        if self.world == 1:
            return make()
        held: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def most(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world == 1:
            return value
        held = torch.tensor([value])
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def sums(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Each tensor summed over the processes, in place where there is one.

        ``None`` counts as zero, and stays ``None`` where no process has anything.
        """
        if self.world == 1:
            return list(tensors)
        known: list[Any] = [None] * self.world
        own = [None if each is None else (each.shape, each.dtype, each.device.type) for each in tensors]
        dist.all_gather_object(known, own)
        found = list[Tensor | None]()
        for each, theirs in zip(tensors, zip(*known)):
            about = next((kind for kind in theirs if kind is not None), None)
            if about is not None:
                shape, dtype, kind = about
                each = torch.zeros(shape, dtype=dtype, device=pick_local(kind)) if each is None else each.contiguous()
                dist.all_reduce(each)
            found.append(each)
        return found

    def merged(self, own: Mapping[str, T]) -> dict[str, T]:
        """All processes' entries together, everywhere."""
        found = dict[str, T]()
        for rank in range(self.world):
            held: list[Any] = [dict(own) if rank == self.rank else None]
            if self.world > 1:
                dist.broadcast_object_list(held, src=rank)
            found |= held[0]
        return found

    def deal(self, costs: Sequence[int]) -> list[int]:
        """Which of the pieces of work with these costs are this process's, in order.

        The dearest goes first to whoever has least; every process comes to the same shares.

        >>> [Processes(rank, 2).deal([3, 1, 1, 2]) for rank in (0, 1)]
        [[0, 2], [1, 3]]
        """
        loads = [(0, rank) for rank in range(self.world)]
        mine = []
        for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + costs[place], rank))
            if rank == self.rank:
                mine.append(place)
        return sorted(mine)


ALONE = Processes()
_CURRENT: ContextVar[Processes] = ContextVar("attribute_processes", default=ALONE)


def current() -> Processes:
    """Those that this one shares its run with: itself alone, outside of :func:`joined`."""
    return _CURRENT.get()


@contextmanager
def joined() -> Iterator[Processes]:
    """Inside, builds, scores, sums and curvatures are shared among the processes that torchrun started.

    Example::

        with joined() as processes:            # python -m torch.distributed.run --nproc-per-node 4 script.py
            build_index("runs/example", config)
            if processes.first:
                print("done")

    Every process must make the same calls in the same order, and see the same file system. Without torchrun, or with
    one process, nothing changes. Sums go over NCCL where they lie on a GPU, everything else over gloo.

    Raises:
        PeerLost: another process ended before its work was done.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    ours = not dist.is_initialized()
    try:
        if ours:
            if torch.cuda.is_available():
                torch.cuda.set_device(local % torch.cuda.device_count())
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
                init_method=os.environ.get(RENDEZVOUS, "env://"),
                rank=int(os.environ["RANK"]),
                world_size=world,
                timeout=_PATIENCE,
            )
        here = Processes(dist.get_rank(), dist.get_world_size(), local)
        token = _CURRENT.set(here)
        try:
            yield here
        finally:
            _CURRENT.reset(token)
        here.barrier()  # whoever leaves early takes the others' connections with it
        if ours:
            dist.destroy_process_group()
    except RuntimeError as error:
        if _is_lost(error):
            raise PeerLost("another process of this run ended too early: its own message says why") from error
        raise


def gpus() -> int:
    """How many GPUs this machine has."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def pick_local(kind: str = "cuda") -> torch.device:
    """This process's own device of a kind: processes of a machine share its GPUs out."""
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", current().local % torch.cuda.device_count())


def _is_lost(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text.lower() or "onnection closed by peer" in text
