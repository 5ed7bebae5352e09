"""Subject number in real models: the material, and the behaviour that needs it."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from probing._data import last_token_mask

PLURAL = {" are", " do", " have", " go"}


def assets() -> Path:
    """The folder of real models and data."""
    return Path(os.environ.get("TRACE_ASSETS", Path(__file__).parents[4] / "shared/assets"))


def prefixes(train: bool, limit: int, seed: int = 0) -> list[tuple[str, int]]:
    """Distinct sentence beginnings with the number of their last noun, which the verb agrees with: 1 for plural.

    The files' own train and test parts share all nouns, so parts are made here: nouns of the test part are never the
    last noun of a training row.
    """
    found: dict[str, int] = {}
    pairs: dict[str, str] = {}
    for name in ("simple_train", "simple_test", "within_rc_train", "within_rc_test"):
        lines = (assets() / f"agreement/feature-circuits/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            nouns = sorted(row[f"{side}_prefix"].split()[-1] for side in ("clean", "patch"))
            for side in ("clean", "patch"):
                found[row[f"{side}_prefix"]] = int(row[f"{side}_answer"] in PLURAL)
                pairs[row[f"{side}_prefix"]] = "/".join(nouns)
    nouns = sorted(set(pairs.values()))
    order = torch.randperm(len(nouns), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {nouns[i] for i in order[: len(nouns) // 3]}
    rows = sorted((text, number) for text, number in found.items() if (pairs[text] in held_out) != train)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:limit]
    return [rows[i] for i in chosen.tolist()]


def encode(tokenizer, rows: list[tuple[str, int]], bos: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded ids with their attention mask, and labels."""
    start = [tokenizer.bos_token_id] if bos else []
    ids = [start + tokenizer(text, add_special_tokens=False).input_ids for text, _ in rows]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": attention}, torch.tensor([number for _, number in rows])


def continuation(tokenizer, form: str) -> list[int]:
    """Tokens of a word as it continues a sentence; on its own some tokenizers would add a space of theirs."""
    before = tokenizer("The man", add_special_tokens=False).input_ids
    after = tokenizer("The man" + form, add_special_tokens=False).input_ids
    assert after[: len(before)] == before
    return after[len(before) :]


@torch.no_grad()
def agreement(model, inputs: dict[str, Tensor], labels: Tensor, verbs: list[tuple[list[int], list[int]]]) -> Tensor:
    """For each row and verb: 1 if the form that agrees is likelier; forms of several tokens are scored whole."""
    last = last_token_mask(inputs["input_ids"], inputs["attention_mask"]).int().argmax(1)
    right = []
    for singular, plural in verbs:
        scores = [_score(model, inputs, last, form) for form in (singular, plural)]
        right.append(((scores[1] > scores[0]).long() == labels).float())
    return torch.stack(right, 1)


def _score(model, inputs: dict[str, Tensor], last: Tensor, form: list[int]) -> Tensor:
    ids = F.pad(inputs["input_ids"], (0, len(form)))
    attention = F.pad(inputs["attention_mask"], (0, len(form)))
    each = torch.arange(len(ids))
    for offset, token in enumerate(form):
        ids[each, last + 1 + offset], attention[each, last + 1 + offset] = token, 1
    log_p = model(input_ids=ids, attention_mask=attention, use_cache=False).logits.log_softmax(-1)
    return sum(log_p[each, last + offset, token] for offset, token in enumerate(form))  # type: ignore[return-value]


@torch.no_grad()
def text_losses(model, ids: Tensor) -> Tensor:
    """Negative loss per chunk of running text: higher is better, like the other measure."""
    logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -losses.view(len(ids), -1).mean(1)
