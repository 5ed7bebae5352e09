"""JumpReLU with straight-through gradients for the threshold (Rajamanoharan et al. 2024b, eqs. 11–12).

With the rectangle K(z) = 1[|z| < ½] and bandwidth ε:

    ∂f/∂θ = −(θ/ε) K((a − θ)/ε)        ∂H/∂θ = −(1/ε) K((a − θ)/ε)        ∂f/∂a = H(a − θ)        ∂H/∂a = 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsify._select import Above, Rule
from sparsify._sparse import Routes, products_of
from sparsify.activations._base import Activation, Batch, per_entry

if TYPE_CHECKING:
    from sparsify._coder import SparseCoder


class JumpReLU(Activation):
    """All above a threshold per latent, learned by straight-through gradients."""

    counts_batch = True
    scale_free = False

    def add_parameters(self, coder: SparseCoder, made: dict[str, Any]) -> None:
        """A threshold a latent, and the width of the window in which it sees gradients."""
        coder.threshold = nn.Parameter(torch.full((coder.num_latents,), 0.01, **made))
        coder.register_buffer("bandwidth", torch.tensor(0.05, device=made["device"]))

    def rule(self, coder: SparseCoder, k: int) -> Rule:
        """While training, the window reaches half a bandwidth below the threshold."""
        reach = coder.bandwidth.to(coder.dtype) / 2 if coder.training else 0.0
        return Above(coder.threshold.detach() - reach)

    def values(self, coder: SparseCoder, products: Tensor, routes: Routes) -> Tensor:
        """The products above their thresholds."""
        return routes.masked(jump_relu(products, per_entry(coder.threshold, routes), coder.bandwidth))

    def loss(
        self, coder: SparseCoder, products: Tensor, routes: Routes, k: int, target: Tensor, batch: Batch
    ) -> Tensor:
        """(L0 / k − 1)² of the batch: with r = L0 / k − 1 = Σ_c q_c, chunk c gives r q_c with gradient 2 r ∇q_c."""
        steps = routes.masked(step(products, per_entry(coder.threshold, routes), coder.bandwidth)).sum()
        excess = batch.total(steps.detach()) / (batch.tokens * k) - 1
        share = steps / (batch.tokens * k) - products.shape[0] / batch.tokens
        return excess * (2 * share - share.detach())

    def initialise(self, coder: SparseCoder, x: Tensor) -> None:
        """Thresholds start where 4k latents fire."""
        sample = x[:: max(1, x.shape[0] // 512)]
        centred = sample if coder.centre is None else sample - coder.centre
        pre = products_of(centred, coder.encoder.weight, coder.encoder.bias)
        start = pre.topk(min(4 * coder.cfg.k, coder.num_latents), dim=-1).values[:, -1].mean().clamp_min(1e-4)
        coder.threshold.fill_(float(start))
        coder.bandwidth.fill_(float(start) / 2)

    def after_step(self, coder: SparseCoder) -> None:
        """Thresholds stay at or above zero."""
        coder.threshold.clamp_(min=0.0)


ACTIVATION = JumpReLU()


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
