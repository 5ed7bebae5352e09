"""Counter-based random numbers: every entry of a sketch matrix is a pure function of (key, row, column).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", §3.3) in 64-bit integer arithmetic on
the CPU, so that the bytes do not depend on device, shape, thread count, batch size or world size, and the top-left
corner of a larger matrix is the smaller matrix.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def stream_key(*parts: object) -> tuple[int, int]:
    """A 2 × 32-bit Philox key from any identity, such as (module name, side, seed).

    >>> stream_key("h.0.attn", "left", 0) == stream_key("h.0.attn", "left", 0)
    True
    """
    # repr keeps ("a", "b/c") and ("a/b", "c") apart.
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counters: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten Philox rounds: counters ``[..., 4]`` (int64 holding 32-bit words) to random words ``[..., 4]``."""
    c0, c1, c2, c3 = counters.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def rademacher(rows: int, columns: int, key: tuple[int, int], *, first: int = 0) -> Tensor:
    """Independent signs ``[rows, columns]`` in float32: one bit an entry, 128 columns a counter.

    ``first`` is the number of the first row: rows drawn in portions are the rows drawn at once.
    """
    drawn = _words(rows, math.ceil(columns / 128), key, first).reshape(rows, -1)  # [rows, 4 × counters]
    bits = (drawn[..., None] >> torch.arange(32)) & 1  # [rows, words, 32]
    return bits.reshape(rows, -1)[:, :columns].mul(2).sub(1).to(torch.float32)


def normal(rows: int, columns: int, key: tuple[int, int]) -> Tensor:
    """Independent standard normals ``[rows, columns]`` in float32 (Box–Muller in float64, four a counter)."""
    uniform = (_words(rows, math.ceil(columns / 4), key).to(torch.float64) + 0.5) / 2**32  # in (0, 1), never 0
    radius = uniform[..., 0::2].log().mul(-2).sqrt()
    angle = uniform[..., 1::2].mul(2 * math.pi)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return pairs.reshape(rows, -1)[:, :columns].to(torch.float32)


def order(count: int, key: tuple[int, int]) -> Tensor:
    """A random permutation of ``count`` numbers: the order of as many 64-bit keys, ties by number."""
    drawn = _words(1, math.ceil(count / 2), key).reshape(-1, 2)
    return ((drawn[:, 0] << 31) ^ drawn[:, 1])[:count].argsort(stable=True)


def words(rows: int, columns: int, key: tuple[int, int]) -> Tensor:
    """Random 32-bit words ``[rows, columns]`` as int64, four columns a counter."""
    return _words(rows, math.ceil(columns / 4), key).reshape(rows, -1)[:, :columns]


def _words(rows: int, counters: int, key: tuple[int, int], first: int = 0) -> Tensor:
    """Random words ``[rows, counters, 4]``; the counter is (column block, first + row, 0, 0)."""
    grid = torch.zeros(rows, counters, 4, dtype=torch.int64)
    grid[..., 0] = torch.arange(counters)
    grid[..., 1] = torch.arange(first, first + rows)[:, None]
    return philox(grid, key)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 × 32-bit product (int64 wraps, which keeps the bits right)."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK
