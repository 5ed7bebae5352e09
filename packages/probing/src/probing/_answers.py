"""Answers: what the model may say for each class, and whether it finds the right one likeliest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import torch
from torch import Tensor, nn

from probing._data import ProbeData
from probing._errors import DataError


def parse_answers(given: str, names: Sequence[str]) -> dict[str, str]:
    """One answer a class, from ``" is, are"`` in the order of the labels, or from ``"sg= is,pl= are"``.

    >>> parse_answers("sg= is,pl= are", ["pl", "sg"])
    {'pl': ' are', 'sg': ' is'}

    Raises:
        click.UsageError: answers that are empty, alike, or not one a class.
    """
    parts = given.split(",")
    longest = sorted(names, key=len, reverse=True)
    owners = [next((name for name in longest if part.lstrip().startswith(f"{name}=")), None) for part in parts]
    if all(owners):
        answers = {str(name): part.lstrip()[len(str(name)) + 1 :] for name, part in zip(owners, parts)}
    elif any(owners):
        odd = parts[owners.index(None)]
        raise click.UsageError(f"--answers: {odd!r} names no label; the labels are {', '.join(names)}")
    else:
        answers = dict(zip(names, parts))
    if len(parts) != len(names) or len(answers) != len(names):
        raise click.UsageError(
            f"--answers has {len(parts)} words for {len(names)} labels: give one a label, in the order "
            f"{', '.join(names)}, or as LABEL=word,LABEL=word"
        )
    for name, word in answers.items():
        if not word.strip():
            raise click.UsageError(f"--answers: the answer of {name!r} is empty; a comma stands between two answers")
    if len(set(answers.values())) < len(answers):
        raise click.UsageError(f"--answers: two labels have one answer ({given}), so nothing could tell them apart")
    return {name: answers[name] for name in names}


def continuation(tokenizer: Any, word: str) -> list[int]:
    """Tokens of a word as it continues a sentence.

    Raises:
        DataError: the word has no tokens of its own there, or one that the tokenizer does not know.
    """
    before = tokenizer("The man", add_special_tokens=False).input_ids
    after = tokenizer("The man" + word, add_special_tokens=False).input_ids
    found = after[len(before) :]
    if after[: len(before)] != before or not found:
        raise DataError(f"--answers: {word!r} grows together with the word before it; begin it with a space")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in found:
        raise DataError(
            f"--answers: the tokenizer does not know {word!r}, so the model cannot say it; use another word"
        )
    return found


def check_fit(
    data: ProbeData, places: Sequence[str], answers: Mapping[str, Sequence[int]], context: int | None
) -> None:
    """Refuse a row after whose probed token an answer would leave the model's context."""
    word, tokens = max(answers.items(), key=lambda item: len(item[1]))
    needed = data.token_mask.int().argmax(1) + len(tokens)
    row = int(needed.argmax())
    if context is not None and int(needed[row]) > context:
        raise DataError(
            f"{places[row]}: the text up to the probed token and the answer {word!r} need {int(needed[row])} tokens, "
            f"but the model takes {context}; shorten the text"
        )


def choice_measure(
    data: ProbeData,
    answers: Sequence[Sequence[int]],
    batch_size: int = 64,
    seen: Callable[[], None] = lambda: None,
) -> Callable[[nn.Module], Tensor]:
    """A measure of behaviour: 1 where the answer of the row's class is the likeliest of all after the probed token.

    Args:
        data: one probed position a row; the answer would follow it.
        answers: tokens of each class's answer.
        batch_size: rows at a time; a last one alone joins the batch before, for resampling takes two.
        seen: called whenever all rows have been measured.
    """
    at = data.token_mask.int().argmax(1)
    ids, attention = data.inputs["input_ids"], data.inputs["attention_mask"]

    @torch.no_grad()
    def measure(model: nn.Module) -> Tensor:
        right = []
        for rows in batches(len(ids), batch_size):
            scores = torch.stack([_log_p(model, ids[rows], attention[rows], at[rows], answer) for answer in answers], 1)
            right.append((scores.argmax(1) == data.labels[rows]).float())
        seen()
        return torch.cat(right)

    return measure


def batches(rows: int, size: int) -> list[Tensor]:
    """Row numbers in batches of this size, none of one row alone.

    >>> [len(batch) for batch in batches(9, 4)]
    [4, 5]
    """
    parts = list(torch.arange(rows).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _log_p(model: nn.Module, ids: Tensor, attention: Tensor, at: Tensor, answer: Sequence[int]) -> Tensor:
    each, length = torch.arange(len(ids), device=ids.device), int(at.max()) + len(answer)
    room = max(0, length - ids.shape[1])  # an answer's last token is predicted, never read
    ids, attention = (nn.functional.pad(t, (0, room))[:, :length].clone() for t in (ids, attention))
    attention *= torch.arange(length, device=ids.device) <= at[:, None]  # what followed the position is not shown
    for offset, token in enumerate(answer[:-1]):
        ids[each, at + 1 + offset], attention[each, at + 1 + offset] = token, 1
    log_p = model(input_ids=ids, attention_mask=attention, use_cache=False).logits.float().log_softmax(-1)
    return torch.stack([log_p[each, at + offset, token] for offset, token in enumerate(answer)]).sum(0)
