"""The processes of a torchrun, or the only one: sums, gathers, and who writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sparsify._errors import ConfigError


@contextmanager
def joined() -> Iterator[int]:
    """Join the processes torchrun started, if it did, and leave them at the end; gives the local rank.

    Inside another `joined()` it joins nothing and leaves nothing: a second group on the same port could meet the store
    of the first one and wait for ever.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or dist.is_initialized():
        yield int(local_rank or 0)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(local_rank))
    # Downloads and tokenizing on the first process may keep the others waiting for hours.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    try:
        yield int(local_rank)
        dist.barrier()  # one that leaves early takes the others' connections with it
    finally:
        dist.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process runs the block before all others do."""
    processes = Processes()
    if not processes.first:
        processes.barrier()
    yield
    if processes.first:
        processes.barrier()


class Processes:
    """This process among its peers. Without torch.distributed there is one, and every operation is the identity."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.world = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over processes."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast_(self, *tensors: Tensor) -> None:
        """Replace each tensor by the first process's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier()

    def merge(self, values: dict[str, float]) -> dict[str, float]:
        """All processes' entries together, everywhere."""
        if self.world == 1:
            return values
        found: list[dict[str, float]] = [{} for _ in range(self.world)]
        dist.all_gather_object(found, values)
        return {name: value for part in found for name, value in part.items()}

    def owned(self, names: Sequence[str]) -> list[str]:
        """This process's share of the hookpoints, contiguous."""
        if len(names) % self.world:
            raise ConfigError(
                f"distribute_modules gives every process equally many hookpoints, but {len(names)} do not divide among "
                f"{self.world} processes: change --nproc_per_node, --layers or --layer_stride"
            )
        share = len(names) // self.world
        return list(names[self.rank * share : (self.rank + 1) * share])

    def gather_rows(self, rows: Tensor, owner: int) -> Tensor:
        """All processes' rows, in order of process, at the owner; elsewhere nothing worth reading.

        Only the owner receives: an all-gather would cost every process every hookpoint's activations.
        """
        if self.world == 1:
            return rows
        counts = torch.zeros(self.world, dtype=torch.long, device=rows.device)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        longest = int(counts.max())
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        received = [torch.empty_like(padded) for _ in range(self.world)] if self.rank == owner else None
        dist.gather(padded, received, dst=owner)
        if received is None:
            return rows[:0]
        return torch.cat([part[:count] for part, count in zip(received, counts.tolist())])
