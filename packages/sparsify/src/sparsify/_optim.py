"""Optimisers and their schedule. The learning rate is a function of the step alone, so resuming cannot shift it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsify._coder import SparseCoder
from sparsify._config import TrainConfig
from sparsify._errors import ConfigError


class Optimiser(Protocol):
    """What the trainer needs of an optimiser."""

    def step(self, step: int, /) -> None:
        """Apply the gradients of optimiser step number ``step``, counted from 0, and clear them."""
        ...

    def settle(self) -> Callable[[], None]:
        """Give the parameters the weights worth keeping; the function returned takes those that are trained back."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """The inverse of `state_dict`."""
        ...


def make_optimiser(cfg: TrainConfig, coders: Sequence[SparseCoder], total_steps: int) -> Optimiser:
    """The optimiser a configuration names, over all parameters of all coders."""
    if cfg.optimizer == "adam":
        groups = [{"params": list(c.parameters()), "lr": cfg.lr or adam_lr(c.num_latents)} for c in coders]
        return Scheduled([torch.optim.Adam(groups, fused=_fusable(coders))], cfg.lr_warmup_steps, total_steps)
    if cfg.optimizer == "signum":
        groups = [{"params": list(c.parameters()), "lr": cfg.lr or signum_lr(c.num_latents)} for c in coders]
        return ScheduleFreeSign(groups)
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer='muon' needs torch 2.9 or later, this is {torch.__version__}: use adam")
    matrices = [p for c in coders for p in c.parameters() if p.ndim == 2]
    vectors = [p for c in coders for p in c.parameters() if p.ndim != 2]
    lr = cfg.lr or 2e-3
    # 0.2 √max(rows, columns) per update (Liu et al. 2025, §2.2); no weight decay, which would pull on unit-norm rows.
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(vectors, lr=lr, fused=_fusable(coders))
    return Scheduled([muon, adam], cfg.lr_warmup_steps, total_steps)


def adam_lr(latents: int) -> float:
    """2e-4 / √(M / 2^14), the law EleutherAI fitted to Gao et al. 2024, figure 3."""
    return 2e-4 / (latents / 2**14) ** 0.5


def signum_lr(latents: int) -> float:
    """5e-3 / √(M / 2^14)."""
    return 5e-3 / (latents / 2**14) ** 0.5


def rate(step: int, warmup: int, total: int) -> float:
    """Share of the peak rate at a step: up over ``warmup`` steps, then down to reach 0 after the last.

    >>> [round(rate(t, 2, 6), 2) for t in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


class Scheduled:
    """Ordinary optimisers under linear warm-up and linear decay."""

    def __init__(self, optimizers: Sequence[Optimizer], warmup: int, total: int) -> None:
        self.optimizers, self.total = list(optimizers), total
        # A warm-up as long as the run would never reach the rate it warms up to.
        self.warmup = min(warmup, total // 10)
        self.peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def step(self, step: int) -> None:
        """One update at the step's own rate."""
        share = rate(step, self.warmup, self.total)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def settle(self) -> Callable[[], None]:
        """The weights as they are."""
        return lambda: None

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimisers."""
        return {"optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)


class ScheduleFreeSign(Optimizer):
    """Sign descent under schedule-free averaging (Defazio et al. 2024, eqs. 3–5), in one pass over memory.

        z ← z − γ sign ∇(y)        x ← (1 − c) x + c z,  c = 1/(t + 1)        y ← (1 − β) z + β x

    The parameters hold y, where gradients are taken, and only z is stored: x = (y − (1 − β) z) / β. Put into the
    update of y, x vanishes: y ← (1 − c)(y − (1 − β) z_old) + (1 − β + β c) z_new, and with z_old = z_new + γ sign ∇
    that is y ← (1 − c) y + c z_new − (1 − c)(1 − β) γ sign ∇. On a CPU, piece by piece, while a piece is in cache.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "t": 0})

    @torch.no_grad()
    def step(self, step: int | None = None, /) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update; the rate is constant, so the step number handed in is not used."""
        del step
        for group in self.param_groups:
            beta, c = group["beta"], 1 / (group["t"] + 1)
            group["t"] += 1
            for y in group["params"]:
                if y.grad is None:
                    continue
                for part, z, sign in _pieces(y, self._z(y), y.grad):
                    z.add_(sign.sign_(), alpha=-group["lr"])
                    part.lerp_(z, c).add_(sign, alpha=-(1 - c) * (1 - beta) * group["lr"])
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def settle(self) -> Callable[[], None]:
        """The averages x; y comes back bit for bit."""
        kept = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    p.add_(self._z(p), alpha=group["beta"] - 1).div_(group["beta"])

        def take_back() -> None:
            with torch.no_grad():
                for p, y in kept.items():
                    p.copy_(y)

        return take_back

    def _z(self, p: Tensor) -> Tensor:
        if "z" not in self.state[p]:
            self.state[p]["z"] = p.detach().clone()
        return self.state[p]["z"]


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """CPU tensors of one shape in pieces of half a megabyte; others are best left whole."""
    if any(each.device.type != "cpu" or not each.is_contiguous() for each in tensors):
        return (tensors,)
    return zip(*(each.view(-1).split(1 << 17) for each in tensors))


def _fusable(coders: Sequence[nn.Module]) -> bool:
    return all(
        p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for c in coders for p in c.parameters()
    )
