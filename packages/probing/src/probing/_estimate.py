"""Numbers that say how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % interval: bootstrap over examples, or Student's over repeated draws.

    >>> str(Estimate.over_examples(torch.ones(20)))
    '1.000 [1.000, 1.000]'
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def over_examples(cls, values: Tensor, resamples: int = 1000, seed: int = 0) -> Estimate:
        """Percentile bootstrap of the mean of one value per example."""
        values = values.detach().double().flatten().cpu()
        n = len(values)
        draw = torch.Generator().manual_seed(seed)
        # In blocks: [1000, n] indices of a large test set would not fit.
        means = torch.cat(
            [values[torch.randint(n, (part, n), generator=draw)].mean(1) for part in [50] * (resamples // 50)]
        )
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(float(values.mean()), low, high, n)

    @classmethod
    def over_draws(cls, values: Sequence[float]) -> Estimate:
        """Mean of repeated draws (controls, seeds, reference sets) ± t · s/√n."""
        x = torch.tensor(list(values), dtype=torch.float64)
        n = len(x)
        half = float(x.std() / n**0.5) * _t975(n - 1) if n > 1 else float("nan")
        return cls(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, n)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by Cornish–Fisher around the normal's; exact to 1 % from three on."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if freedom in table:
        return table[freedom]
    z = 1.959964
    g1, g2 = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + g1 / freedom + g2 / freedom**2
