"""The slow truth: autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def one_by_one(model: nn.Module, losses: Callable[[int], Tensor], examples: int, names: list[str]) -> dict[str, Tensor]:
    """Weight gradients [examples, out, in] of each example's own loss; Conv1D is turned to [out, in]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for example in range(examples):
        model.zero_grad()
        losses(example).backward()
        for name in names:
            module = model.get_submodule(name)
            gradient = module.get_parameter("weight").grad
            gradient = torch.zeros_like(module.get_parameter("weight")) if gradient is None else gradient.clone()
            found[name].append(gradient.T if type(module).__name__ == "Conv1D" else gradient)
    model.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
