"""The soft nearest neighbour loss of circuit probing, forward and gradient in one sweep."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPSILON = 1e-5
_LOG2_E = 1 / math.log(2)
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
        n, tags = v.shape[-2], _tags(labels)
        if keys is None and n * v.shape[:-1].numel() <= _CHUNK:
            loss, toward = _all_at_once(v, tags, needs)
        else:
            loss, toward = _by_rows(v, None if keys is None else unit(keys)[0], tags, needs)
        if toward is not None:
            toward -= v * (v * toward).sum(-1, keepdim=True)  # from v̂ to v
            ctx.save_for_backward(toward.div_(torch.where(norm == 0, float("inf"), norm) * n).to(vectors.dtype))
        return loss.div_(n)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def,override]
        (toward,) = ctx.saved_tensors
        return toward * grad[..., None, None].to(toward.dtype), None, None


def _all_at_once(v: Tensor, tags: Tensor, needs: bool) -> tuple[Tensor, Tensor | None]:
    """N·loss and N·∂L/∂v̂. w is symmetric: the upper half of its rows and the lower right quarter say all."""
    half = v.shape[-2] // 2
    up, low = v[..., :half, :], v[..., half:, :]
    w, mine = _similar(up, v, 0, tags[..., :half], tags)
    corner, mine_corner = _similar(low, low, 0, tags[..., half:], tags[..., half:])
    own, every = (
        torch.cat([upper.sum(-1), lower.sum(-1).add_(upper[..., half:].sum(-2))], -1)
        for upper, lower in ((mine, mine_corner), (w, corner))
    )
    loss = _log_ratio(own, every)
    if not needs:
        return loss, None
    # As below, and once more for j: ∂L/∂cosᵢⱼ = wᵢⱼ (1/everyᵢ + 1/everyⱼ − [same] (1/ownᵢ + 1/ownⱼ)) / N
    for matrix, same, rows, columns in (
        (w, mine, slice(half), slice(None)),
        (corner, mine_corner, *[slice(half, None)] * 2),
    ):
        matrix.mul_(every[..., rows, None] + every[..., None, columns])
        matrix.sub_(same.mul_(own[..., rows, None] + own[..., None, columns]))
    lower = torch.matmul(corner, low).add_(torch.matmul(w[..., half:].mT, up))
    return loss, torch.cat([torch.matmul(w, v), lower], -2)


def _by_rows(v: Tensor, keys: Tensor | None, tags: Tensor, needs: bool) -> tuple[Tensor, Tensor | None]:
    """N·loss and N·∂L/∂v̂, some rows of w at a time."""
    n, k = v.shape[-2], v if keys is None else keys
    toward = torch.zeros_like(v)
    loss = torch.zeros(v.shape[:-2], device=v.device)
    rows = max(1, _CHUNK // max(1, n * v.shape[:-2].numel()))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        w, mine = _similar(v[..., part, :], k, start, tags[..., part], tags)
        own, every = mine.sum(-1), w.sum(-1)
        loss += _log_ratio(own, every)
        if not needs:
            continue
        # ∂L/∂cosᵢⱼ = wᵢⱼ (1/everyᵢ − [same]/ownᵢ) / N
        w.mul_(every[..., None]).sub_(mine.mul_(own[..., None]))
        toward[..., part, :] += torch.matmul(w, k)
        if keys is None:
            toward += torch.matmul(w.mT, v[..., part, :])
    return loss, toward if needs else None


def _similar(v: Tensor, k: Tensor, diagonal: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """e·wᵢⱼ, and the same where the labels are: […, R, N], with 0 for i itself, ``diagonal`` columns from the left."""
    w = torch.matmul(v * _LOG2_E, k.mT).exp2_()  # a third of the time of exp
    w.diagonal(diagonal, -2, -1).zero_()
    # Straight to floats: a product with booleans converts them each time, which costs more than all the rest.
    return w, torch.eq(rows[..., None], columns[..., None, :], out=torch.empty_like(w)).mul_(w)


def _log_ratio(own: Tensor, every: Tensor) -> Tensor:
    """−Σᵢ log(ownᵢ / everyᵢ) from sums of e·w; these become 1 / (e·sum), which the gradient needs."""
    for total in (own, every):
        total.add_(math.e * EPSILON).reciprocal_()
    return (own / every).log_().sum(-1)
