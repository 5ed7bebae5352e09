"""The demo's network, a GPT-NeoX as Pythia's but small, and the loop that trains it.

Two choices serve attribution. Label smoothing keeps the answer's probability below one, for at one a fact that is
known perfectly has no gradient left and nothing to find it by; dropout makes facts carry over to unseen wordings. After
20 epochs, by exact gradients of all linear layers, MRR is 0.70 without smoothing and 1.00 with (99 and 100% answered).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

IGNORE = -100
PAD = 0  # the id of the only special token

OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Recipe:
    """Everything beside the texts that shapes the weights."""

    vocabulary: int = 1600  # at most; the default corpus runs out of merges before
    context: int = 64  # tokens
    width: int = 64
    layers: int = 3
    heads: int = 4
    epochs: int = 18
    batch: int = 32  # documents
    rate: float = 3e-3  # at the peak
    warmup: float = 0.1  # share of all steps
    decay: float = 0.1  # of matrices
    dropout: float = 0.1
    smoothing: float = 0.3
    seed: int = 0


def new_network(recipe: Recipe, vocabulary: int) -> GPTNeoXForCausalLM:
    """The untrained network; draws from torch's global generator."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=4 * recipe.width,
            max_position_embeddings=recipe.context,
            hidden_dropout=recipe.dropout,
            bos_token_id=PAD,
            eos_token_id=PAD,
            pad_token_id=PAD,
        )
    )


def train_network(
    network: GPTNeoXForCausalLM, documents: Sequence[Sequence[int]], recipe: Recipe, on_step: OnStep | None = None
) -> None:
    """Train in place on token ids; ``on_step(done, total, loss)`` after every step. Draws from the global generator."""
    total = recipe.epochs * math.ceil(len(documents) / recipe.batch)
    optimizer = _optimizer(network, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / total, recipe.warmup))
    network.train()
    for done, (ids, labels) in enumerate(_batches(documents, recipe), start=1):
        logits = network(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORE,
            label_smoothing=recipe.smoothing,
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(done, total, loss.item())
    network.eval()


def padded(documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and labels ``[n, s]``, padded on the right, where causal attention never looks back from."""
    longest = max(map(len, documents))
    ids = torch.full((len(documents), longest), PAD)
    labels = torch.full((len(documents), longest), IGNORE)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document)
    return ids, labels


def _batches(documents: Sequence[Sequence[int]], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(documents)).split(recipe.batch):
            yield padded([documents[row] for row in rows.tolist()])


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [each for each in network.parameters() if each.ndim > 1]
    vectors = [each for each in network.parameters() if each.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)


def _rate(progress: float, warmup: float) -> float:
    """Share of the peak rate: up in a straight line, down to a tenth along a cosine."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
