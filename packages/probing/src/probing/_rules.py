"""Mask rules: how real-valued logits become a mask, soft while training and binary ever after.

A rule is one small frozen dataclass with four answers: the initial logits, the training mask, the final binary mask,
and the share of a unit that counts as kept. Add a rule by writing one class and naming it in `RULES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from probing._errors import ConfigError


@dataclass(frozen=True)
class MaskRule:
    """Base of all rules; `ContinuousSparsification` is the plainest to read."""

    name: ClassVar[str] = ""
    trainable: ClassVar[bool] = True
    anneals: ClassVar[bool] = False
    """Whether the training mask depends on a temperature (here an inverse one: larger is harder)."""
    thresholded: ClassVar[bool] = True
    """Whether the final mask keeps the positive logits, however many; if not, the rule fixes how many."""

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """Logits to start from, fp32; ``magnitudes`` holds one weight norm per unit and gives the shape."""
        raise NotImplementedError

    def soft(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """The mask of one training step."""
        raise NotImplementedError

    def hard(self, logits: Tensor) -> Tensor:
        """The final mask, boolean. A logit of exactly zero is pruned."""
        return logits > 0

    def kept(self, logits: Tensor, temperature: float) -> Tensor:
        """Differentiable share of each unit that counts as kept: what the sparsity penalty adds up."""
        raise NotImplementedError


@dataclass(frozen=True)
class ContinuousSparsification(MaskRule):
    """σ(βs) while training, 1[s > 0] after (Savarese et al. 2020); β grows by schedule.

    >>> rule = ContinuousSparsification(init_value=0.5)
    >>> rule.hard(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([False, False,  True])
    """

    name = "continuous_sparsification"
    anneals = True
    init_value: float = 0.0

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """The same logit for all."""
        return torch.full_like(magnitudes, self.init_value)

    def soft(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """σ(βs)."""
        return torch.sigmoid(temperature * logits)

    def kept(self, logits: Tensor, temperature: float) -> Tensor:
        """σ(βs)."""
        return torch.sigmoid(temperature * logits)


@dataclass(frozen=True)
class HardConcrete(MaskRule):
    """Stretched, clamped concrete samples (Louizos et al. 2018, eqs. 10–12); the final mask keeps log α > 0.

    ``init_percentage`` p sets log α = logit(p), p clipped to [1e-4, 1 − 1e-4].
    """

    name = "hard_concrete"
    init_percentage: float = 0.5
    gamma: float = -0.1
    zeta: float = 1.1
    beta: float = 2 / 3

    def __post_init__(self) -> None:
        if not 0 <= self.init_percentage <= 1:
            raise ConfigError(f"mask_init_percentage={self.init_percentage} must lie in [0, 1]")
        if not self.gamma < 0 < 1 < self.zeta:
            raise ConfigError(f"the stretch must contain [0, 1]: gamma={self.gamma} < 0 and zeta={self.zeta} > 1")

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """logit(p) for all."""
        p = min(max(self.init_percentage, 1e-4), 1 - 1e-4)
        return torch.full_like(magnitudes, math.log(p / (1 - p)))

    def soft(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """One sample per unit."""
        noise = _logistic(logits, generator)
        return (torch.sigmoid((noise + logits) / self.beta) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def kept(self, logits: Tensor, temperature: float) -> Tensor:
        """P(mask ≠ 0) = σ(log α − β log(−γ/ζ))."""
        return torch.sigmoid(logits - self.beta * math.log(-self.gamma / self.zeta))


@dataclass(frozen=True)
class StraightThrough(MaskRule):
    """Binary forward, sigmoid backward: m = 1[s > 0] + σ(βs) − sg(σ(βs))."""

    name = "straight_through"
    anneals = True
    init_value: float = 0.5

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """The same logit for all; it starts above zero, where everything is kept."""
        return torch.full_like(magnitudes, self.init_value)

    def soft(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """Binary values with the sigmoid's gradient."""
        return _through(self.hard(logits), torch.sigmoid(temperature * logits))

    def kept(self, logits: Tensor, temperature: float) -> Tensor:
        """σ(βs)."""
        return torch.sigmoid(temperature * logits)


@dataclass(frozen=True)
class GumbelSigmoid(MaskRule):
    """Straight-through with logistic noise on the logits (Csordás et al. 2021)."""

    name = "gumbel_sigmoid"
    anneals = True
    init_value: float = 1.0

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """The same logit for all."""
        return torch.full_like(magnitudes, self.init_value)

    def soft(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """One binary sample per unit with the sigmoid's gradient."""
        noisy = logits + _logistic(logits, generator)
        return _through(noisy > 0, torch.sigmoid(temperature * noisy))

    def kept(self, logits: Tensor, temperature: float) -> Tensor:
        """P(logit + noise > 0) = σ(s)."""
        return torch.sigmoid(logits)


@dataclass(frozen=True)
class TopK(MaskRule):
    """Exactly ⌈keep · n⌉ units of each site, straight-through (Ramanujan et al. 2020)."""

    name = "top_k"
    thresholded = False
    keep: float = 0.1

    def __post_init__(self) -> None:
        _check_share("keep", self.keep)

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """Small random scores, so that the first choice is arbitrary but seeded."""
        return 0.01 * torch.randn(magnitudes.shape, generator=generator, device=magnitudes.device)

    def soft(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """The binary choice with the sigmoid's gradient."""
        return _through(self.hard(logits), torch.sigmoid(logits))

    def hard(self, logits: Tensor) -> Tensor:
        """The k largest scores."""
        return _largest(logits, math.ceil(self.keep * logits.numel()))

    def kept(self, logits: Tensor, temperature: float) -> Tensor:
        """The choice itself: its size is fixed, so a penalty on it is a constant."""
        return self.hard(logits).to(logits.dtype)


@dataclass(frozen=True)
class Magnitude(MaskRule):
    """Prunes the given share of smallest |w| (units: smallest norm); nothing to train.

    >>> logits = Magnitude(0.5).initial(torch.tensor([0.1, 3.0, 0.2, 2.0]), torch.Generator())
    >>> Magnitude(0.5).hard(logits)
    tensor([False,  True, False,  True])
    """

    name = "magnitude_pruning"
    trainable = False
    thresholded = False
    prune_percentage: float = 0.2

    def __post_init__(self) -> None:
        _check_share("prune_percentage", self.prune_percentage)

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """+1 for the kept, −1 for the pruned."""
        n = magnitudes.numel()
        return _largest(magnitudes, n - round(self.prune_percentage * n)).float() * 2 - 1

    def soft(self, logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """The binary mask."""
        return self.hard(logits).to(logits.dtype)

    def kept(self, logits: Tensor, temperature: float) -> Tensor:
        """The binary mask."""
        return self.hard(logits).to(logits.dtype)


@dataclass(frozen=True)
class Random(Magnitude):
    """A seeded random mask that keeps the given share: the baseline every trained mask must beat."""

    name = "random"
    keep: float = 0.5
    prune_percentage: float = 0.0

    def __post_init__(self) -> None:
        _check_share("keep", self.keep)

    def initial(self, magnitudes: Tensor, generator: torch.Generator) -> Tensor:
        """+1 for the kept, −1 for the pruned."""
        scores = torch.rand(magnitudes.shape, generator=generator, device=magnitudes.device)
        return _largest(scores, round(self.keep * scores.numel())).float() * 2 - 1


RULES: dict[str, type[MaskRule]] = {
    rule.name: rule
    for rule in (ContinuousSparsification, HardConcrete, StraightThrough, GumbelSigmoid, TopK, Magnitude, Random)
}


def _logistic(like: Tensor, generator: torch.Generator) -> Tensor:
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    u = u * (1 - 2e-4) + 1e-4  # as Louizos et al.: keep both logarithms finite
    return u.log() - (-u).log1p()


def _through(hard: Tensor, soft: Tensor) -> Tensor:
    # Not hard + soft − soft.detach(): in floating point that is 0.99999994 as often as 1.
    return _Through.apply(hard, soft)  # type: ignore[return-value]


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.to(soft.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


def _largest(scores: Tensor, k: int) -> Tensor:
    order = scores.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[order[:k]] = True
    return chosen.view(scores.shape)


def _check_share(option: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{option}={value} must be a share in [0, 1]")
