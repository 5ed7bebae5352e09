"""The sparse step: one dense encoder product, everything else over the few latents that fired.

With a = (x − c) Wᵀ + b and S the chosen entries (Gao et al. 2024, §2 and appendix A):

    ∂L/∂W[j] = Σ_{n: j∈S_n} ∂L/∂a_nj (x_n − c)        rows of unchosen latents stay zero
    ∂L/∂b[j] = Σ_{n: j∈S_n} ∂L/∂a_nj
    ∂L/∂c    = −Wᵀ ∂L/∂b                               one mat-vec per batch, not a product per token

Sums over a token's latents and over a latent's tokens are both embedding bags, so no (N, k, D) tensor exists, and the
(N, M) products live only in one block of rows that stays in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsify._screen import screened_topk, screens
from sparsify._select import BLOCK_BYTES, Rule, Selection, TopK
from sparsify.kernels import kernels_for

DENSE_SHARE = 8
"""A code wider than M / 8 is cheaper to differentiate by dense products."""


class Routes:
    """Where each entry of an (N, K) code goes: by token as it lies, by latent after one sort, shared by all users."""

    def __init__(self, indices: Tensor, valid: Tensor | None, latents: int) -> None:
        self.indices, self.valid, self.latents = indices, valid, latents
        self._by_latent: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def dense(self) -> bool:
        """Whether so many latents are in use that dense products win."""
        return self.indices.shape[1] * DENSE_SHARE > self.latents

    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entry numbers in latent order, their tokens, and where each latent's entries begin."""
        if self._by_latent is None:
            flat, entry = self.indices.flatten(), None
            if self.valid is not None:
                entry = self.valid.flatten().nonzero().squeeze(1)
                flat = flat[entry]
            order = _stable_order(flat, self.latents)
            entry = order if entry is None else entry[order]
            counts = torch.bincount(flat, minlength=self.latents)
            token = entry.div(max(self.indices.shape[1], 1), rounding_mode="floor")
            self._by_latent = entry, token, counts.cumsum(0) - counts
        return self._by_latent

    def sum_by_latent(self, weights: Tensor, rows: Tensor) -> Tensor:
        """(M, D): for each latent, Σ over its entries of weight times the token's row."""
        if self.dense:
            return product(self.scattered(weights).T, rows)
        entry, token, begin = self.by_latent()
        return bag(token, rows, begin, weights.flatten()[entry])

    def total_by_latent(self, weights: Tensor) -> Tensor:
        """(M,): for each latent, the sum of its entries' weights."""
        return weights.new_zeros(self.latents).scatter_add_(0, self.indices.flatten(), self.masked(weights).flatten())

    def sum_by_token(self, weights: Tensor, rows: Tensor) -> Tensor:
        """(N, D): for each token, Σ over its entries of weight times the latent's row."""
        if self.dense:
            return product(self.scattered(weights), rows)
        n, width = self.indices.shape
        begin = torch.arange(0, n * width, width, device=self.indices.device) if width else None
        if begin is None:
            return rows.new_zeros(n, rows.shape[1])
        return bag(self.indices.flatten(), rows, begin, self.masked(weights).flatten())

    def dots(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """(N, K): for each entry, the dot product of its token's row with its latent's row."""
        if self.dense:
            return self.masked(product(tokens, rows.T).gather(1, self.indices))
        with unrounded(rows):
            return self.masked(kernels_for(rows).dots(self.indices, tokens, rows))

    def masked(self, weights: Tensor) -> Tensor:
        """The weights with padding at zero."""
        return weights if self.valid is None else weights.masked_fill(~self.valid, 0.0)

    def scattered(self, weights: Tensor) -> Tensor:
        """The code as a dense (N, M) tensor."""
        out = weights.new_zeros(self.indices.shape[0], self.latents)
        return out.scatter_add_(1, self.indices, self.masked(weights))


def _stable_order(keys: Tensor, bound: int) -> Tensor:
    """The stable sort of whole numbers below ``bound``: narrow keys on a CPU, where numpy sorts 16 bits by radix."""
    if keys.device.type == "cpu" and bound <= 1 << 16:
        return torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), kind="stable"))
    return torch.sort(keys.int(), stable=True).indices


def bag(indices: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """Σ of weight times row within each bag; bag i starts at begin[i] and empty bags give zeros."""
    if not indices.numel():
        return rows.new_zeros(begin.numel(), rows.shape[1])
    with unrounded(rows):
        return kernels_for(rows).bag(indices, rows, begin, weights)


def unrounded(like: Tensor) -> torch.autocast:
    """A context without autocast: only the products by which latents are chosen follow it."""
    return torch.autocast(like.device.type, enabled=False)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, also under autocast."""
    with unrounded(a):
        return a @ b


class Products(NamedTuple):
    """Chosen pre-activations of every rule side by side: (N, ΣK), differentiable, and where they belong."""

    values: Tensor
    routes: Routes
    widths: tuple[int, ...]


def chosen_products(x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor | None, rules: Sequence[Rule]) -> Products:
    """(x − centre) · weightᵀ + bias, kept only where a rule chooses, with a sparse gradient.

    Args:
        x: (N, D).
        weight: (M, D). bias: (M,). centre: (D,), or None where nothing is subtracted.
        rules: each contributes its entries; all see the same products, which are computed once.

    Under autocast rules choose by products in its dtype; what they chose is computed again in the weights' own.
    """
    with torch.no_grad():
        x_c = x.detach() if centre is None else x.detach() - centre
        chosen = _sweep(x_c, weight, bias, rules)
        values, indices, valid = _side_by_side(chosen)
        routes = Routes(indices, valid, weight.shape[0])
        if values.dtype != weight.dtype:  # chosen in bf16, valued in full
            values = routes.dots(x_c, weight) + routes.masked(bias[indices])
    values = _SparseGradient.apply(values, routes, x_c, x, weight, bias, centre)
    return Products(values, routes, tuple(s.indices.shape[1] for s in chosen))


class _SparseGradient(torch.autograd.Function):
    """Identity on the chosen products; its backward is theirs."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, routes: Routes, x_c: Tensor, x: Tensor, weight: Tensor, bias: Tensor, centre: Any
    ) -> Tensor:
        ctx.save_for_backward(x_c, weight)
        ctx.routes = routes
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x_c, weight = ctx.saved_tensors
        routes: Routes = ctx.routes
        need_x, need_weight, need_bias, need_centre = ctx.needs_input_grad[3:]
        by_latent = routes.total_by_latent(grad)
        return (
            None,
            None,
            None,
            routes.sum_by_token(grad, weight) if need_x else None,
            routes.sum_by_latent(grad, x_c) if need_weight else None,
            by_latent if need_bias else None,
            -product(by_latent, weight) if need_centre else None,
        )


def decode(acts: Tensor, routes: Routes, weight: Tensor) -> Tensor:
    """(N, Do): Σ_j acts_nj weight[j], with a sparse gradient for both. acts is (N, K), weight (M, Do)."""
    return _Decode.apply(acts, weight, routes)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, weight: Tensor, routes: Routes) -> Tensor:
        ctx.save_for_backward(acts, weight)
        ctx.routes = routes
        return routes.sum_by_token(acts, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        acts, weight = ctx.saved_tensors
        routes: Routes = ctx.routes
        need_acts, need_weight, _ = ctx.needs_input_grad
        return (
            routes.dots(grad, weight) if need_acts else None,
            routes.sum_by_latent(acts, grad) if need_weight else None,
            None,
        )


def _sweep(x: Tensor, weight: Tensor, bias: Tensor, rules: Sequence[Rule]) -> list[Selection]:
    """Run every rule over the blocks of products; a rule that asks for it gets another sweep."""
    match rules:
        case [TopK(k, in_order=False)] if screens(x, weight, k):
            return [screened_topk(x, weight, bias, k)]
    done: list[Selection | None] = [None] * len(rules)
    while any(s is None for s in done):
        parts: dict[int, list[Selection]] = {i: [] for i, s in enumerate(done) if s is None}
        for block in _blocks(x, weight, bias):
            for i in parts:
                parts[i].append(rules[i].take(block))
        for i, taken in parts.items():
            done[i] = rules[i].finish(taken)
    return [s for s in done if s is not None]


def _blocks(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """Blocks of (x Wᵀ + b), each valid until the next: they share one buffer."""
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    n, latents = x.shape[0], weight.shape[0]
    rows = max(1, min(n, BLOCK_BYTES // (latents * x.element_size())))
    # A GPU wants few large products; a CPU wants the block to stay in its cache.
    rows = max(1, min(n, rows * 16)) if x.device.type == "cuda" else rows
    buffer = x.new_empty(rows, latents)
    for s in range(0, max(n, 1), rows):
        part = x[s : s + rows]
        yield torch.addmm(bias, part, weight.T, out=buffer[: part.shape[0]])


def _side_by_side(chosen: Sequence[Selection]) -> Selection:
    if len(chosen) == 1:
        return chosen[0]
    valid = None
    if any(s.valid is not None for s in chosen):
        valid = torch.cat(
            [torch.ones_like(s.indices, dtype=torch.bool) if s.valid is None else s.valid for s in chosen], 1
        )
    return Selection(torch.cat([s.values for s in chosen], 1), torch.cat([s.indices for s in chosen], 1), valid)


def products_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All products at once, (N, M): for those who ask for pre-activations."""
    with unrounded(x):
        return torch.addmm(bias.to(weight.dtype), x.to(weight.dtype), weight.T)
