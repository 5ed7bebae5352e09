"""A model spread over the processes of a run (FSDP2): each holds a share of every block, and gathers it to run it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING

from torch import nn

from attribute._errors import ModelError
from attribute.processes import current, pick_local

if TYPE_CHECKING:
    import torch

    from attribute.model import LanguageModel


def load_spread(load: Callable[[], LanguageModel], device: torch.device) -> LanguageModel:
    """Load a model on the CPU and spread it, one process of a machine after the other, so that it is there but once.

    Args:
        load: loads the whole model on the CPU.
        device: where it runs.

    Raises:
        ModelError: one process alone, or no blocks to spread.
    """
    from torch.distributed.device_mesh import init_device_mesh

    here = current()
    if here.world == 1:
        raise ModelError("--fsdp spreads a model over several processes: --nproc-per-node 2 or more")
    device = pick_local(device.type)
    mesh = init_device_mesh(device.type, (here.world,))
    found: LanguageModel | None = None
    for turn in range(here.most(here.local) + 1):
        if turn == here.local:
            found = _spread(load(), mesh, device)
        here.barrier()
    assert found is not None
    return found


def _spread(loaded: LanguageModel, mesh: object, device: torch.device) -> LanguageModel:
    """Embeddings, output embedding and final norm stay whole: the loss reads them outside of any block."""
    from torch.distributed.fsdp import fully_shard

    # GPT-2's base answers with a view, which nobody changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Of the whole weights, which nobody has any more afterwards.
    known = (loaded.fingerprint(), loaded.head_fingerprint())
    blocks = list(_blocks(loaded.base))
    if not blocks:
        raise ModelError(f"{loaded.name or 'the model'} has no list of blocks to spread: leave --fsdp away")
    for block in blocks:
        fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
    if "ignored_params" in signature(fully_shard).parameters:  # torch 2.6 has no such root: blocks are not prefetched
        inside = {id(each) for block in blocks for each in block.parameters()}
        outside = {each for each in loaded.base.parameters() if id(each) not in inside}
        fully_shard(loaded.base, mesh=mesh, ignored_params=outside)  # type: ignore[arg-type]
    loaded.model.to(device)
    return replace(loaded, sharded=True, known=known)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
