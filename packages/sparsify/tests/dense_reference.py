"""The slow reference: every activation and loss by dense autograd, written from the formulas."""

import torch
from torch import nn


def groups(a, k):
    n, m = a.shape
    best = a.view(n, k, m // k).argmax(-1) + torch.arange(k) * (m // k)
    return torch.zeros_like(a, dtype=torch.bool).scatter(1, best, True)


def largest(a, k):
    return torch.zeros_like(a, dtype=torch.bool).scatter(1, a.topk(k, dim=1).indices, True)


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, theta, eps):
        ctx.save_for_backward(a, theta)
        ctx.eps = eps
        return (a > theta).to(a.dtype)

    @staticmethod
    def backward(ctx, g):
        a, theta = ctx.saved_tensors
        window = ((a - theta).abs() < ctx.eps / 2).to(a.dtype)
        return torch.zeros_like(a), -(g * window).sum(0) / ctx.eps, None


class Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, theta, eps):
        ctx.save_for_backward(a, theta)
        ctx.eps = eps
        return a * (a > theta)

    @staticmethod
    def backward(ctx, g):
        a, theta = ctx.saved_tensors
        window = ((a - theta).abs() < ctx.eps / 2).to(a.dtype)
        return g * (a > theta), -(theta / ctx.eps) * (g * window).sum(0), None


def dense_losses(coder, x, y, dead=None):
    """sae_out, code f (N, M), and every loss, from dense matrices."""
    cfg = coder.cfg
    centre = 0 if cfg.transcode else coder.b_dec
    a = (x - centre) @ coder.encoder.weight.T + coder.encoder.bias
    sparsity = torch.zeros((), dtype=x.dtype)
    match cfg.activation:
        case "topk":
            f = torch.where(largest(a, cfg.k), a.relu(), 0)
        case "groupmax":
            f = torch.where(groups(a, cfg.k), a.relu(), 0)
        case "batchtopk":
            chosen = torch.zeros(a.numel(), dtype=torch.bool)
            chosen[a.flatten().topk(cfg.k * len(x)).indices] = True
            f = torch.where(chosen.view_as(a), a.relu(), 0)
        case "jumprelu":
            eps = float(coder.bandwidth)
            f = Jump.apply(a, coder.threshold, eps)
            sparsity = (Step.apply(a, coder.threshold, eps).sum() / (len(x) * cfg.k) - 1) ** 2
        case "gated":
            shared = a - coder.encoder.bias
            f = (a > 0) * (coder.r_mag.exp() * shared + coder.b_mag).relu()
    base = coder.b_dec if coder.W_skip is None else coder.b_dec + x @ coder.W_skip.T
    out = f @ coder.W_dec + base
    variance = (y - y.mean(0)).pow(2).sum()
    losses = {"fvu": (y - out).pow(2).sum() / variance}
    if dead is not None:
        half = y.shape[1] // 2
        k_aux = min(half, int(dead.sum()))
        z = torch.where(largest(a.masked_fill(~dead, -torch.inf), k_aux), a.relu(), 0)
        error = (y - out).detach()
        losses["auxk_loss"] = min(int(dead.sum()) / half, 1.0) * (z @ coder.W_dec - error).pow(2).sum() / variance
    if cfg.multi_topk:
        wide = torch.where(largest(a, 4 * cfg.k), a.relu(), 0)
        losses["multi_topk_fvu"] = (y - wide @ coder.W_dec - base).pow(2).sum() / variance
    if cfg.matryoshka:
        losses["nested_fvu"] = sum(
            (y - f[:, :m] @ coder.W_dec[:m] - base).pow(2).sum() / variance for m in cfg.matryoshka[:-1]
        )
    if cfg.activation == "gated":
        gate, frozen = a.relu(), coder.W_dec.detach()
        scale = (variance / len(x)).sqrt()
        sparsity = (gate * frozen.norm(dim=1)).sum() / (len(x) * scale * cfg.k**0.5)
        sparsity = sparsity + (y - gate @ frozen - coder.b_dec.detach()).pow(2).sum() / variance
    losses["sparsity_loss"] = sparsity
    return out, f, losses


def gradients(loss, coder: nn.Module, *extra):
    parameters = dict(coder.named_parameters())
    wanted = [*parameters.values(), *extra]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found)]
