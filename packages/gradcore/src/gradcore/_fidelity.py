"""How much of the exact gradients' geometry a sketch keeps, measured on a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradcore._errors import GradCoreError


@dataclass(frozen=True)
class Fidelity:
    """Sketched against exact gradients of the same examples.

    Attributes:
        spearman: mean over examples of the rank correlation of their cosines with all others.
        error: root mean square of ⟨sketched⟩ − ⟨exact⟩ over pairs of different examples, divided by the norms' product.
        norm: the same for squared norms: the standard deviation of the relative error.
        examples: how many.
    """

    spearman: float
    error: float
    norm: float
    examples: int

    def __str__(self) -> str:
        return f"Spearman {self.spearman:.3f}, inner products ±{self.error:.3f} ({self.examples} rows)"


def fidelity(sketched: Tensor, exact: Tensor) -> Fidelity:
    """Compare the rows of two matrices of gradients of the same examples.

    >>> import torch
    >>> rows = torch.randn(20, 50)
    >>> print(fidelity(rows, rows))
    Spearman 1.000, inner products ±0.000 (20 rows)

    Args:
        sketched: ``[n, width]``. exact: ``[n, D]``.

    Raises:
        GradCoreError: fewer than 3 rows with a gradient, or another number of rows on one side.
    """
    if len(sketched) != len(exact):
        raise GradCoreError(f"{len(sketched)} sketched rows and {len(exact)} exact ones are not of the same examples")
    exact, sketched = exact.double(), sketched.double()
    return gram_fidelity(sketched @ sketched.T, exact @ exact.T)


def gram_fidelity(sketched: Tensor, exact: Tensor) -> Fidelity:
    """The same from inner products alone, which can be summed module by module.

    Args:
        sketched, exact: ``[n, n]`` inner products of the same examples.

    Raises:
        GradCoreError: fewer than 3 examples with a gradient.
    """
    scale = exact.double().diagonal().sqrt()
    kept = scale > 0
    if int(kept.sum()) < 3:
        raise GradCoreError("fidelity needs at least 3 examples with a gradient")
    both = (each.double()[kept][:, kept] / scale[kept] / scale[kept, None] for each in (exact, sketched))
    truth, found = both
    norms = found.diagonal().sqrt().clamp_min(torch.finfo(torch.double).tiny)
    apart = ~torch.eye(len(truth), dtype=torch.bool, device=truth.device)
    ranks = [_ranks(each[apart].view(len(truth), -1)) for each in (truth, found / norms / norms[:, None])]
    return Fidelity(
        spearman=float(torch.linalg.vecdot(*ranks).mean()),
        error=float((found - truth)[apart].square().mean().sqrt()),
        norm=float((found.diagonal() - 1).square().mean().sqrt()),
        examples=len(truth),
    )


def _ranks(scores: Tensor) -> Tensor:
    """Ranks by row, centred and of unit length."""
    ranks = scores.argsort(1).argsort(1).double()
    ranks -= ranks.mean(1, keepdim=True)
    return ranks / ranks.norm(dim=1, keepdim=True)
