"""The slow truth: autograd, one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradcore import CapturePlan


def one_by_one(model: nn.Module, losses: Callable[[int], Tensor], examples: int, names: list[str]) -> dict[str, Tensor]:
    """Weight gradients [examples, out, in] of each example's own loss; Conv1D is turned to [out, in]."""
    plan = CapturePlan.for_model(model, names)
    return planned_one_by_one(model, losses, examples, plan)


def planned_one_by_one(
    model: nn.Module, losses: Callable[[int], Tensor], examples: int, plan: CapturePlan
) -> dict[str, Tensor]:
    """The same for every module of a plan, biases as a last column."""
    found: dict[str, list[Tensor]] = {planned.name: [] for planned in plan.modules}
    for example in range(examples):
        model.zero_grad()
        losses(example).backward()
        for planned in plan.modules:
            module = model.get_submodule(planned.name)
            gradient = _gradient(module, "weight")
            gradient = gradient.T if type(module).__name__ == "Conv1D" else gradient.reshape(planned.out_features, -1)
            columns = [gradient, _gradient(module, "bias")[:, None]] if planned.bias else [gradient]
            found[planned.name].append(torch.cat(columns, dim=1))
    model.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _gradient(module: nn.Module, name: str) -> Tensor:
    parameter = module.get_parameter(name)
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
