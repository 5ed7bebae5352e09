"""The arithmetic of Lepori et al. 2024: small transformers whose algorithm is known, trained here in half a minute.

Experiment 1 (disambiguation): f(a, b) = a² − b² mod P equals (a + b)(a − b); which of the two does a network compute?
Experiment 2 (shared nodes): two tasks, f₁ = a mod 29 + c mod 31 and f₂ = a mod 29 + b mod 23, share one operand.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel


@dataclass(frozen=True)
class Task:
    """Rows of tokens, their answers, named variables, and a split."""

    ids: Tensor
    answers: Tensor
    variables: dict[str, Tensor]
    train: Tensor
    test: Tensor
    vocabulary: int


def disambiguation(modulus: int, seed: int = 0) -> Task:
    """All pairs (a, b, =) with the answer a² − b² mod P; 60 % of them to train on."""
    p = modulus
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    ids = torch.stack([a, b, torch.full_like(a, p)], 1)
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    cut = int(0.6 * p * p)
    variables = {"a^2": a * a % p, "-b^2": -b * b % p, "a+b": (a + b) % p, "a-b": (a - b) % p}
    return Task(ids, (a * a - b * b) % p, variables, order[:cut], order[cut:], p + 1)


def shared_nodes(modulus: int, moduli: tuple[int, int, int], seed: int = 0) -> Task:
    """Rows (task, a, b, c, =). The operand a task ignores is drawn independently of the others.

    In the published data it is a fixed permutation of the operand in use, which leaks the "unused" variable.
    """
    p, (shared, first, second) = modulus, moduli
    draw = torch.Generator().manual_seed(seed)
    a, used = (grid.flatten() for grid in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    parts, answers, free = [], [], []
    for task in (0, 1):
        ignored = torch.randint(p, (p * p,), generator=draw)
        b, c = (ignored, used) if task == 0 else (used, ignored)
        parts.append(torch.stack([torch.full_like(a, p + 1 + task), a, b, c, torch.full_like(a, p)], 1))
        value = c % first if task == 0 else b % second
        free.append(torch.stack([c % first, b % second], 1))
        answers.append(a % shared + value)
    ids, both = torch.cat(parts), torch.cat(free)
    order = torch.randperm(len(ids), generator=draw)
    cut = int(0.6 * len(ids))
    variables = {"shared": ids[:, 1] % shared, "free 1": both[:, 0], "free 2": both[:, 1], "task": ids[:, 0] - p - 1}
    return Task(ids, torch.cat(answers) % p, variables, order[:cut], order[cut:], p + 3)


def network(task: Task) -> GPT2LMHeadModel:
    """The papers' architecture: one layer, four heads, width 128, ReLU."""
    config = GPT2Config(
        vocab_size=task.vocabulary, n_positions=task.ids.shape[1], n_embd=128, n_layer=1, n_head=4, n_inner=512,
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def last_logits(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """The model's logits at the last position, with no work on the others beyond keys and values."""
    block, width = model.transformer.h[0], model.config.n_embd
    x = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
    normed, projection = block.ln_1(x), block.attn.c_attn
    k, v = F.linear(normed, projection.weight[:, width:].T, projection.bias[width:]).chunk(2, -1)
    q = F.linear(normed[:, -1], projection.weight[:, :width].T, projection.bias[:width])
    q, k, v = q.unflatten(-1, (4, -1)), k.unflatten(-1, (4, -1)), v.unflatten(-1, (4, -1))  # [n, h, d], [n, T, h, d]
    weights = ((q[:, None] * k).sum(-1) * q.shape[-1] ** -0.5).softmax(1)
    last = x[:, -1] + block.attn.c_proj((weights[..., None] * v).sum(1).flatten(1))
    last = last + block.mlp(block.ln_2(last))
    return model.lm_head(model.transformer.ln_f(last))


def train(
    task: Task,
    epochs: int,
    lr: float,
    seed: int = 0,
    decay: float = 0.0,
    start: GPT2LMHeadModel | None = None,
    after: Callable[[int, GPT2LMHeadModel], bool] | None = None,
) -> GPT2LMHeadModel:
    """Full-batch AdamW as in the paper; over the last ``decay`` of the epochs the rate falls to zero.

    ``start`` goes on from a trained network; ``after`` is called with each epoch's number and may end it by True.
    """
    torch.manual_seed(seed)
    model = network(task) if start is None else start
    ids, answers = task.ids[task.train], task.answers[task.train]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1.0)
    tail = max(1.0, decay * epochs)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda e: min(1.0, 1 / 3 + e / 15) * (min(1.0, (epochs - e) / tail) if decay else 1.0)
    )
    for epoch in range(epochs):
        optimiser.zero_grad()
        F.cross_entropy(last_logits(model, ids).double(), answers).backward()
        optimiser.step()
        rate.step()
        if after is not None and after(epoch + 1, model):
            break
    return model.eval()


@torch.no_grad()
def correct(model: torch.nn.Module, task: Task, rows: Tensor) -> Tensor:
    """1 for each row answered right, 0 otherwise; ``model`` may be any wrapper."""
    logits = model(input_ids=task.ids[rows], use_cache=False).logits[:, -1]
    return (logits.argmax(-1) == task.answers[rows]).float()
