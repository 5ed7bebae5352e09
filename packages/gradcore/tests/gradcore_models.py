"""Small models of every shape that the capture must get right, without transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """A stand-in for the layer of the same name in transformers: weight [in, out]."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.3)
        self.bias = nn.Parameter(torch.randn(out_features) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


# Layers are recognised by name so that transformers need not be installed.
Conv1D.__module__ = "transformers.pytorch_utils"


class Block(nn.Module):
    """Attention-free transformer block: two matrices of different orientation, a norm, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = Conv1D(2 * width, width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class TinyLM(nn.Module):
    """Embedding, causal mixing by cumulative mean, two blocks, a head: rows of different length, padded right."""

    def __init__(self, vocabulary: int = 23, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[None, :, None]
        for block in self.blocks:
            x = block(x + torch.stack([x[:, : t + 1].sum(1) for t in range(x.shape[1])], 1) / steps)
        return x


class Reused(nn.Module):
    """One layer called three times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))
