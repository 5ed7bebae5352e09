"""JumpReLU and its step, with straight-through gradients for the threshold (Rajamanoharan et al. 2024b, eqs. 11–12).

With the rectangle K(z) = 1[|z| < ½] and bandwidth ε:

    ∂f/∂θ = −(θ/ε) K((a − θ)/ε)        ∂H/∂θ = −(1/ε) K((a − θ)/ε)        ∂f/∂a = H(a − θ)        ∂H/∂a = 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def jump_relu(a: Tensor, theta: Tensor, bandwidth: Tensor) -> Tensor:
    """a where a > θ, else 0. Shapes of a and θ are equal."""
    return _JumpReLU.apply(a, theta, bandwidth)


def step(a: Tensor, theta: Tensor, bandwidth: Tensor) -> Tensor:
    """1 where a > θ, else 0; only θ gets a gradient."""
    return _Step.apply(a, theta, bandwidth)


def _window(a: Tensor, theta: Tensor, bandwidth: Tensor) -> Tensor:
    return ((a - theta).abs() < bandwidth / 2).to(a.dtype)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, theta: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(a, theta, bandwidth)
        return a * (a > theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        a, theta, bandwidth = ctx.saved_tensors
        return grad * (a > theta), -grad * theta / bandwidth * _window(a, theta, bandwidth), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, theta: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(a, theta, bandwidth)
        return (a > theta).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        a, theta, bandwidth = ctx.saved_tensors
        return None, -grad / bandwidth * _window(a, theta, bandwidth), None
