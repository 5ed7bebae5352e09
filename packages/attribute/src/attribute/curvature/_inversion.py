"""Ways to invert a positive semi-definite matrix whose small eigenvalues are noise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from attribute._errors import AttributionError

KINDS = ("damped", "absolute", "tikhonov", "pseudo-inverse", "factored")


@dataclass(frozen=True)
class Inversion:
    """What an eigenvalue becomes.

    >>> Inversion("damped", 0.5).of(torch.tensor([1.0, 3.0]))
    tensor([0.5000, 0.2500])

    With l an eigenvalue, m the mean of the module's spectrum and c the damping:

    ==================  ==========================================================================
    ``damped``          1 / (l + c m); Grosse et al. 2023, section 3.1, with c = 0.1
    ``absolute``        1 / (l + c)
    ``tikhonov``        l / (l² + (c m)²)
    ``pseudo-inverse``  1 / l where l > c m, else 0
    ``factored``        1 / ((l_G + √(c m) / π) (l_A + π √(c m))), π² = mean l_A / mean l_G; Martens & Grosse 2015, 6.3;
                        only for Kronecker factors that are not eigenvalue-corrected
    ==================  ==========================================================================

    Damping is relative to each module's own mean, so it means the same in all of them. A module whose curvature is
    zero has had no gradient and gets the multiplier 0.

    Args:
        kind: one of :data:`KINDS`.
        damping: c, at least 0.
        power: −1, or −½ for either side of a cosine.
    """

    kind: str = "damped"
    damping: float = 0.1
    power: float = -1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AttributionError(f"--inversion must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not 0 <= self.damping < float("inf"):
            raise AttributionError(f"--damping must be 0 or positive, not {self.damping}")
        if self.power not in (-1.0, -0.5):
            raise AttributionError(f"the power of the curvature is -1 or -0.5, not {self.power}")

    def of(self, eigenvalues: Tensor) -> Tensor:
        """The multiplier of every eigenvalue of one module, in float64."""
        if self.kind == "factored":
            raise AttributionError(
                "--inversion factored damps both Kronecker factors: a Gram matrix and corrected eigenvalues have none "
                "(--inversion damped)"
            )
        values = eigenvalues.double().clamp(min=0)
        mean = values.mean()
        if mean == 0:
            return self._powered(torch.zeros_like(values))
        floor = self.damping * (1.0 if self.kind == "absolute" else mean)
        if self.kind == "tikhonov":
            return self._powered(torch.where(values > 0, values / (values**2 + floor**2), 0.0))
        if self.kind == "pseudo-inverse":
            return self._powered(torch.where(values > floor, 1 / values, 0.0))
        if floor == 0 and (values == 0).any():
            raise AttributionError(
                "the curvature is singular and --damping is 0: give a positive --damping, or --inversion pseudo-inverse"
            )
        return self._powered(1 / (values + floor))

    def of_factors(self, out: Tensor, given: Tensor) -> Tensor:
        """The multipliers ``[out, in]`` of a Kronecker product of two spectra."""
        if self.kind != "factored":
            return self.of(out[:, None].double() * given[None].double())
        out, given = out.double().clamp(min=0), given.double().clamp(min=0)
        if not out.mean() * given.mean():
            return self._powered(out.new_zeros(len(out), len(given)))
        root = (self.damping * out.mean() * given.mean()).sqrt()
        balance = (out.mean() / given.mean()).sqrt()
        # Each factor's damping is in proportion to its own mean: root · π for the out side, root / π for the in side.
        damped = (out + root * balance)[:, None] * (given + root / balance)[None]
        return self._powered(1 / damped)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    def _powered(self, multipliers: Tensor) -> Tensor:
        return multipliers if self.power == -1 else multipliers.sqrt()
