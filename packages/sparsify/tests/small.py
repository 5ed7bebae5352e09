"""A tiny model with every kind of module call a hookpoint may meet, and token rows for it."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Config:
    num_hidden_layers: int


class Attention(nn.Module):
    """Called with keywords only and returns a tuple, as transformers' attention does."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, *, hidden_states, mask=None):
        past = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return self.mix(past), None


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(hidden_states=x, mask=None)[0]
        return x + self.down(self.act(self.up(x)))


class Base(nn.Module):
    def __init__(self, vocabulary, width, depth):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.unused = nn.Linear(width, width)
        self.calls = []

    def forward(self, ids):
        x = self.embed(ids)
        for i, layer in enumerate(self.layers):
            self.calls.append(i)
            x = layer(x)
        return x


class Tiny(nn.Module):
    """Width 12 by default; `calls` lists the layers that ran."""

    def __init__(self, vocabulary=30, width=12, depth=3, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.base_model = Base(vocabulary, width, depth)
            self.head = nn.Linear(width, vocabulary)
        self.config = Config(depth)

    def forward(self, ids):
        return self.head(self.base_model(ids))


def token_rows(rows=64, length=16, vocabulary=30, seed=0):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
