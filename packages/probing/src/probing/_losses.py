"""The soft nearest neighbour loss of circuit probing, forward and gradient in one sweep."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-5
_CHUNK = 2**24  # similarities held at once


def soft_nearest_neighbour(vectors: Tensor, labels: Tensor, keys: Tensor | None = None) -> Tensor:
    """How little each vector's neighbourhood, by cosine, is its own class.

    >>> same, apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), torch.tensor([0, 0, 1, 1])
    >>> round(soft_nearest_neighbour(same, apart).item(), 4)
    0.5514

    L = −1/N Σᵢ log((ε + Σ_{j≠i, yⱼ=yᵢ} wᵢⱼ) / (ε + Σ_{j≠i} wᵢⱼ)), wᵢⱼ = exp(cos(vᵢ, vⱼ) − 1), ε = 1e-5, with
    cos(0, ·) = 0: a circuit that writes nothing has a defined loss and a zero gradient (Lepori et al. 2024; Frosst
    et al. 2019).

    Args:
        vectors: [N, d], or [P, N, d] for P probes at once.
        labels: [N] or [P, N].
        keys: compare with these vectors instead, held constant: the "linear" loss, which asks the circuit's output to
            lie by the full model's vectors of the same class.

    Returns:
        A scalar, or [P]; fp32.
    """
    return _SoftNearestNeighbour.apply(vectors, labels, keys)  # type: ignore[return-value]


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Directions and lengths, fp32; the direction of a zero vector is zero."""
    vectors = vectors.float()
    norm = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(norm == 0, 1.0, norm), norm


def _tags(labels: Tensor) -> Tensor:
    """Labels as floats: comparisons of integers are five times as slow."""
    if int(labels.max()) >= 2**24:  # where floats no longer tell neighbours apart
        labels = labels.unique(return_inverse=True)[1]
    return labels.float()


class _SoftNearestNeighbour(torch.autograd.Function):
    @staticmethod
    def forward(ctx, vectors: Tensor, labels: Tensor, keys: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad[0]
        v, norm = unit(vectors)
        k = v if keys is None else unit(keys)[0]
        n, tags = v.shape[-2], _tags(labels)
        toward = torch.zeros_like(v)  # dL/dv̂
        loss = torch.zeros(v.shape[:-2], device=v.device)
        rows = max(1, _CHUNK // max(1, n * v.shape[:-2].numel()))
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            w = torch.matmul(v[..., part, :], k.mT).exp_()  # e·wᵢⱼ, […, r, N]; the sums are divided by e
            w.diagonal(start, -2, -1).zero_()
            # Straight to floats: a product with booleans converts them each time, which costs more than all the rest.
            mine = torch.eq(tags[..., part, None], tags[..., None, :], out=torch.empty_like(w)).mul_(w)
            own, every = (t.sum(-1).mul_(1 / math.e).add_(EPSILON) for t in (mine, w))
            loss -= (own / every).log().sum(-1)
            if not needs:
                continue
            # ∂L/∂cosᵢⱼ = wᵢⱼ (1/everyᵢ − [same]/ownᵢ) / N
            own, every = (t.mul_(math.e).reciprocal_()[..., None] for t in (own, every))
            if keys is None and rows >= n:  # w is symmetric: both arguments' gradients in one product
                w.mul_(every + every.mT).sub_(mine.mul_(own + own.mT))
                toward = torch.matmul(w, v)
                continue
            w.mul_(every).sub_(mine.mul_(own))
            toward[..., part, :] += torch.matmul(w, k)
            if keys is None:
                toward += torch.matmul(w.mT, v[..., part, :])
        if needs:
            toward -= v * (v * toward).sum(-1, keepdim=True)
            ctx.save_for_backward(toward.div_(torch.where(norm == 0, float("inf"), norm) * n).to(vectors.dtype))
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def,override]
        (toward,) = ctx.saved_tensors
        return toward * grad[..., None, None].to(toward.dtype), None, None
