"""Attention for the probed positions alone: one query a row instead of all of them, and masks as scales of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Up to so many positions the weighted sum is taken position by position: batched products of such small matrices cost
# up to six times as much (500 rows, 3 positions; the other way about at 15).
_SHORT = 8


@dataclass(eq=False)
class AttentionCall(Exception):
    """What an attention was about to compute for the probed positions, carried out of a model that expects all of them.

    R rows, K key-value heads, G query heads to each, S positions seen, D channels a head.
    """

    query: Tensor
    """[R, K, G, D], at the probed position."""
    key: Tensor
    """[R, K, S, D]"""
    value: Tensor
    """[R, K, S, D]"""
    bias: Tensor
    """[R, 1 or K, 1 or G, S], added to the scores: 0 where a position is seen, −∞ where not."""
    scale: float

    def heads(self) -> Tensor:
        """Head outputs [R, K·G·D]."""
        weights = (_scores(self.query * self.scale, self.key) + self.bias).softmax(-1)
        return _mixed(weights, self.value).flatten(1)


@contextmanager
def probed_queries(block: nn.Module, token_mask: Tensor) -> Iterator[None]:
    """Inside, the first attention of ``block`` ends in an `AttentionCall`; all others compute as always.

    Works for models that dispatch through transformers' attention interface with ``sdpa``; for others nothing happens.

    Args:
        block: the transformer block probed.
        token_mask: [rows, positions], exactly one True a row.
    """
    inside = set(block.modules())
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    at = token_mask.int().argmax(1)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache"))
        if module not in inside or special or kwargs.get("dropout"):
            return plain(module, query, key, value, attention_mask, **kwargs)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        raise _call_at(query, key, value, attention_mask, at, bool(causal), kwargs.get("scaling"))

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _call_at(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, at: Tensor, causal: bool, scale: float | None
) -> AttentionCall:
    rows, _, positions, width = query.shape
    own, seen = key.shape[1], key.shape[2]
    each = torch.arange(rows, device=query.device)
    first = int(at[0])
    q = query[:, :, first] if bool((at == first).all()) else query[each, :, at]  # a slice is cheap, also backwards
    bias = query.new_zeros(rows, 1, 1, seen)
    if mask is not None:
        shown = mask.expand(rows, -1, -1, -1)[each, :, at][..., :seen]  # [R, 1 | heads, S]
        shown = shown.unsqueeze(1) if shown.shape[1] == 1 else shown.view(rows, own, -1, seen)
        bias = bias.masked_fill(~shown, -math.inf) if shown.dtype == torch.bool else bias + shown
    elif causal and int(at.min()) < positions - 1:  # the last position sees all
        future = torch.arange(seen, device=query.device) > (at + seen - positions)[:, None]
        bias = bias.masked_fill(future[:, None, None], -math.inf)
    return AttentionCall(q.reshape(rows, own, -1, width), key, value, bias, width**-0.5 if scale is None else scale)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """[R, K, G, D] and [R, K, S, D] → [R, K, G, S]."""
    return torch.matmul(query, key.mT)


def _mixed(weights: Tensor, value: Tensor) -> Tensor:
    """[R, K, G, S] and [R, K, S, D] → [R, K, G, D]."""
    if value.shape[2] > _SHORT:
        return torch.matmul(weights, value)
    total = value[:, :, None, 0] * weights[..., :1]
    for position in range(1, value.shape[2]):
        total = torch.addcmul(total, value[:, :, None, position], weights[..., position : position + 1])
    return total


@dataclass(frozen=True)
class FoldedAttention:
    """Attention whose queries, keys and values are a mask's channels times constants, plus biases.

    With q = m_q·q̃ + b_q, k = m_k·k̃ + b_k, v = m_v·ṽ + b_v and one query a row,

        scores = q·k = (m_k·q)·k̃ + q·b_k,      heads = m_v·(Σ_s w_s ṽ_s) + b_v,

    and q·b_k, the same for every position, drops out of the softmax: all masks scale one vector a row, none the keys
    and values of whole sequences, which stay constants without gradients.

    Attributes:
        call: q̃, k̃ and ṽ of all rows.
        query_bias: [K, G, D].
        value_bias: [K, 1, D].
        channels: which unit of the folded sites, laid end to end, scales each channel of queries, keys and values.
        sites: the folded sites' paths.
    """

    call: AttentionCall
    query_bias: Tensor
    value_bias: Tensor
    channels: Tensor
    sites: tuple[str, ...]

    def heads(self, keeps: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """Head outputs [R, K·G·D] under masks [units] or [R, units] of the folded sites, for some rows or all."""
        keep = keeps[0] if len(keeps) == 1 else torch.cat(list(keeps), -1)
        keep = keep.to(self.call.query.dtype)
        if not self._in_order or len(self.channels) != keep.shape[-1]:
            keep = keep.index_select(-1, self.channels)
        tensors = (self.call.query, self.call.key, self.call.value, self.call.bias)
        if rows is not None:
            tensors = tuple(tensor.index_select(0, rows) for tensor in tensors)
        return _FoldedHeads.apply(keep, *tensors, self.query_bias, self.value_bias, self.call.scale)  # type: ignore[return-value]

    @cached_property
    def _in_order(self) -> bool:
        return bool((self.channels == torch.arange(len(self.channels), device=self.channels.device)).all())


class _FoldedHeads(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, keep: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, query_bias, value_bias, scale: float
    ) -> Tensor:
        _, heads, group, width = query.shape
        parts = keep.split([heads * group * width, heads * width, heads * width], -1)
        m_q = parts[0].unflatten(-1, (heads, group, width))
        m_k, m_v = (part.unflatten(-1, (heads, 1, width)) for part in parts[1:])
        q = torch.addcmul(query_bias, query, m_q)
        scores = _scores((q * m_k).mul_(scale), key).add_(bias)
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()  # softmax() is slow along so short an axis
        weights.div_(weights.sum(-1, keepdim=True))
        mixed = _mixed(weights, value)
        ctx.save_for_backward(query, key, value, q, weights, mixed, m_k, m_v)
        ctx.scale, ctx.shared = scale, keep.ndim == 1
        return torch.addcmul(value_bias, mixed, m_v).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def,override]
        query, key, value, q, weights, mixed, m_k, m_v = ctx.saved_tensors
        grad = grad.view_as(mixed)
        to_weights = _scores(grad * m_v, value)
        to_scores = weights * to_weights.sub_((weights * to_weights).sum(-1, keepdim=True))
        to_qk = _mixed(to_scores.mul_(ctx.scale), key)
        to_masks = (to_qk * m_k).mul_(query), (to_qk * q).sum(2), grad.mul(mixed).sum(2)
        flat = [part.sum(0).flatten() if ctx.shared else part.flatten(1) for part in to_masks]
        return torch.cat(flat, -1), None, None, None, None, None, None, None


def fold(
    sizes: Sequence[tuple[str, int]], call: Callable[[Sequence[Tensor]], AttentionCall | None]
) -> FoldedAttention | None:
    """Find out whether masks only scale channels of an attention's queries, keys and values; None if they do not.

    Asked by trial, like everything about the prefix: with all units on and off, and with the bits of their numbers,
    which tells each channel's unit. Rotated queries and normed ones are not scaled channels, and the last trial, under
    random masks, gives them away.

    Args:
        sizes: path and number of units of each site that may be folded.
        call: the attention call under given masks of these sites, on a few rows.
    """
    units = sum(count for _, count in sizes)
    number = torch.arange(units)

    def under(mask: Tensor) -> AttentionCall | None:
        return call(mask.float().split([count for _, count in sizes]))

    on, off = under(torch.ones(units)), under(torch.zeros(units))
    if on is None or off is None or on.query.dtype not in (torch.float32, torch.float64):
        return None
    if on.key.shape[-1] != on.value.shape[-1]:  # latent attention has queries wider than its values
        return None
    code = [torch.zeros_like(channel, dtype=torch.long) for channel in _channels(on, off, on)[0]]
    for bit in range(max(1, (units - 1).bit_length())):
        seen = under(number >> bit & 1 == 1)
        assert seen is not None
        for total, has in zip(code, _channels(on, off, seen)[0]):
            total += has.long() << bit
    channels = torch.cat(code)
    if not bool(_channels(on, off, on)[1]) or int(channels.max()) >= units:
        return None
    query_bias, value_bias = off.query[0], off.value[0, :, :1]
    if not all(bool((t == t[:1, :, :1]).all()) for t in (off.key, off.value)) or bool((off.query != query_bias).any()):
        return None
    paths = tuple(path for path, _ in sizes)
    found = FoldedAttention(difference(on, off), query_bias, value_bias, channels, paths)
    keep = torch.rand(units, generator=torch.Generator().manual_seed(5)).to(on.query.device)
    expected = under(keep)
    assert expected is not None
    same = torch.allclose(found.heads([keep]), expected.heads(), rtol=1e-4, atol=1e-6)
    return found if same else None


def difference(on: AttentionCall, off: AttentionCall) -> AttentionCall:
    """q̃, k̃, ṽ: what masks scale."""
    return replace(on, query=on.query - off.query, key=on.key - off.key, value=on.value - off.value)


def _channels(on: AttentionCall, off: AttentionCall, seen: AttentionCall) -> tuple[list[Tensor], Tensor]:
    """For each channel of queries, keys and values: whether its unit is on in ``seen``; and whether all have shown."""
    found, differ = [], []
    for name in ("query", "key", "value"):
        a, b, c = (getattr(each, name) for each in (on, off, seen))
        if name != "query":
            a, b, c = (t.transpose(1, 2).flatten(0, 1).unsqueeze(2) for t in (a, b, c))  # positions are rows here
        a, b, c = (t.flatten(1) for t in (a, b, c))
        where = (a - b).abs().argmax(0, keepdim=True)  # where the unit shows most
        a, b, c = (t.gather(0, where)[0] for t in (a, b, c))
        found.append((c - a).abs() < (c - b).abs())
        differ.append((a != b).all())
    return found, torch.stack(differ).all()
