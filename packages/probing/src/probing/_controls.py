"""Random circuits of the same size: the control without which an ablation means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from probing._errors import MaskError, check_choice

Pool = Literal["all", "complement"]
Scope = Literal["site", "global"]


def sample_like(
    circuit: Mapping[str, Tensor], generator: torch.Generator, *, pool: Pool = "complement", scope: Scope = "site"
) -> dict[str, Tensor]:
    """A random set of units as large as the circuit, as boolean masks of the drawn units.

    >>> drawn = sample_like({"h.0.mlp": torch.tensor([True, False, False])}, torch.Generator().manual_seed(0))
    >>> drawn["h.0.mlp"].sum(), drawn["h.0.mlp"][0]
    (tensor(1), tensor(False))

    Args:
        circuit: the circuit's units, True inside, by site.
        generator: on the CPU; the draw is the same whatever device the masks are on.
        pool: draw from all units, or from those outside the circuit.
        scope: match the size at every site, or only in total.

    Raises:
        MaskError: the control is undefined: the circuit keeps more than half, so its complement is too small.
    """
    check_choice("pool", pool, ("all", "complement"))
    check_choice("scope", scope, ("site", "global"))
    if scope == "global":
        flat = torch.cat([mask.flatten().cpu() for mask in circuit.values()])
        drawn = _draw(flat, generator, pool, "all sites together")
        parts = drawn.split([mask.numel() for mask in circuit.values()])
        return {path: part.view(mask.shape).to(mask.device) for (path, mask), part in zip(circuit.items(), parts)}
    return {
        path: _draw(mask.flatten().cpu(), generator, pool, path).view(mask.shape).to(mask.device)
        for path, mask in circuit.items()
    }


def undefined_sites(circuit: Mapping[str, Tensor]) -> list[str]:
    """Sites where no complement control exists, because the circuit keeps more than half of them."""
    return [path for path, mask in circuit.items() if 2 * int(mask.sum()) > mask.numel()]


def _draw(inside: Tensor, generator: torch.Generator, pool: Pool, where: str) -> Tensor:
    size = int(inside.sum())
    candidates = torch.arange(inside.numel()) if pool == "all" else (~inside).nonzero().flatten()
    if size > candidates.numel():
        raise MaskError(
            f"the matched random control is undefined at {where!r}: the circuit keeps {size} of {inside.numel()} units "
            f"and only {candidates.numel()} are outside it; draw from all units, match sizes globally, or prune harder"
        )
    drawn = torch.zeros_like(inside)
    drawn[candidates[torch.randperm(candidates.numel(), generator=generator)[:size]]] = True
    return drawn
