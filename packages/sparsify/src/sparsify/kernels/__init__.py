"""The two sums of the sparse step, once per kind of device, chosen by the tensors of each call.

    bag(indices, rows, begin, weights)   (B, D)   Σ weight · row over a bag's entries, begin[b] to begin[b + 1]
    dots(indices, tokens, rows)          (N, K)   ⟨tokens[n], rows[indices[n, k]]⟩

A module with these two functions is an implementation: `fused` for CPUs, `tiled` (Triton) for CUDA, and `pieces` for
every other device. Nothing is chosen, compiled or printed when the package is imported.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from sparsify.kernels import fused, pieces

__all__ = ["Kernels", "fused", "kernels_for", "pieces"]


class Kernels(Protocol):
    """An implementation of both sums."""

    def bag(self, indices: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of rows: indices and weights (E,), rows (M, D), begin (B,); (B, D). Empty bags give zeros."""
        ...

    def dots(self, indices: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        """Products of each token with its chosen rows: indices (N, K), tokens (N, D), rows (M, D); (N, K)."""
        ...


def kernels_for(tensor: Tensor) -> Kernels:
    """The implementation for tensors that lie where ``tensor`` does.

    >>> kernels_for(torch.zeros(3)) is fused
    True
    """
    if tensor.device.type == "cpu":
        return fused
    if tensor.device.type == "cuda":
        # Double precision is for checking gradients; Triton would sum it in single.
        return _tiled() if tensor.element_size() < 8 and find_spec("triton") else fused
    return pieces


@cache
def _tiled() -> Kernels:
    from sparsify.kernels import tiled

    return tiled
