"""A probing task from a file: rows of text, a label column, and a rule for the position looked at."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probing._data import ProbeData, last_token_mask
from probing._errors import DataError


@dataclass(frozen=True)
class TextTask:
    """Rows ready to probe.

    Attributes:
        train: rows the probe learns from.
        test: rows it is scored on.
        names: the label each class number stands for.
        texts: the texts of train and test rows, in their order.
    """

    train: ProbeData
    test: ProbeData
    names: list[str]
    texts: tuple[list[str], list[str]]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json (a list), .csv or .tsv file.

    Raises:
        DataError: an unknown ending, a broken line, or no rows.
    """
    path = Path(path)
    ending = path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8")
        if ending == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif ending == ".json":
            rows = json.loads(text)
        elif ending in (".csv", ".tsv"):
            rows = list(csv.DictReader(text.splitlines(), delimiter="," if ending == ".csv" else "\t"))
        else:
            raise DataError(
                f"{path}: rows are read from .jsonl, .json, .csv or .tsv, not {ending or 'a file without ending'}"
            )
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise DataError(f"{path}: expected rows with named columns and found none")
    return rows


def column(rows: Sequence[dict[str, Any]], name: str, path: str | Path = "the data") -> list[Any]:
    """One column of all rows.

    Raises:
        DataError: a row lacks it; close matches are named.
    """
    for number, row in enumerate(rows, 1):
        if row.get(name) is None:
            close = get_close_matches(name, row, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(row)}"
            raise DataError(f"{path}, row {number}: no column {name!r}; {hint}")
    return [row[name] for row in rows]


def load_task(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    label: str,
    text: str = "text",
    position: str = "last",
    test_rows: Sequence[dict[str, Any]] | None = None,
    test_share: float = 0.25,
    max_length: int = 512,
    seed: int = 0,
) -> TextTask:
    """Tokenise, place the probe, number the labels, split.

    Args:
        rows: named columns.
        tokenizer: a Hugging Face tokenizer.
        label: the column of labels; strings or numbers.
        text: the column of texts.
        position: ``"last"``, ``"first"``, a token index (negative from the end), or ``"word:COLUMN"``: the last token
            of the word that column names, where it first occurs in the text.
        test_rows: rows to score on; otherwise a random share of the rows.
        test_share: that share.
        max_length: tokens kept of a row.
        seed: of the split.

    Raises:
        DataError: columns that are absent, positions outside a text, one class only, or an empty part.
    """
    if test_rows is None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        held = round(test_share * len(rows))
        if not 0 < held < len(rows):
            raise DataError(
                f"test_share={test_share} of {len(rows)} rows leaves a part empty; give a test file or more rows"
            )
        parts = [[rows[i] for i in order[held:]], [rows[i] for i in order[:held]]]
    else:
        parts = [list(rows), list(test_rows)]
    names = sorted({str(value) for value in column(parts[0], label)})
    data, texts = [], []
    for part in parts:
        values = [str(value) for value in column(part, label)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise DataError(f"label {unknown[0]!r} occurs in the test rows but never in the training rows")
        strings = [str(value) for value in column(part, text)]
        inputs, mask = _tokenise(strings, part, tokenizer, position, max_length)
        data.append(ProbeData(inputs, torch.tensor([names.index(value) for value in values]), mask))
        texts.append(strings)
    return TextTask(data[0], data[1], names, (texts[0], texts[1]))


def _tokenise(
    texts: list[str], rows: Sequence[dict[str, Any]], tokenizer: Any, position: str, max_length: int
) -> tuple[dict[str, Tensor], Tensor]:
    encoded = [tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True) for text in texts]
    width = max(len(row["input_ids"]) for row in encoded)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    lengths = [len(row["input_ids"]) for row in encoded]
    if not min(lengths):
        raise DataError(f"row {lengths.index(0) + 1} has no tokens, so there is nothing to probe")
    # Right padding whatever the tokenizer prefers: positions then count from the start of each text.
    ids = torch.tensor([row["input_ids"] + [pad] * (width - n) for row, n in zip(encoded, lengths)])
    attention = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    inputs = {"input_ids": ids, "attention_mask": attention}
    if position == "last":
        return inputs, last_token_mask(ids, attention)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for number, (row, length) in enumerate(zip(encoded, lengths)):
        mask[number, _place(position, row, length, texts[number], rows[number], number + 1)] = True
    return inputs, mask


def _place(position: str, encoded: Any, length: int, text: str, row: dict[str, Any], number: int) -> int:
    if position == "first":
        return 0
    if position.startswith("word:"):
        word = str(column([row], position.removeprefix("word:"))[0])
        start = text.find(word)
        if start < 0 or not word:
            raise DataError(f"row {number}: the word {word!r} does not occur in {text!r}")
        end = start + len(word)
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start and b > a]
        if not inside:
            raise DataError(f"row {number}: the word {word!r} lies behind the tokens kept; raise max_length")
        return inside[-1]
    try:
        index = int(position)
    except ValueError:
        raise DataError(f"position={position!r} is no rule; write last, first, a token index, or word:COLUMN") from None
    if not -length <= index < length:
        raise DataError(f"row {number} has {length} tokens, so there is no position {index}")
    return index % length


def choice_measure(
    task_data: ProbeData, answers: Sequence[Sequence[int]], batch_size: int = 64
) -> Callable[[nn.Module], Tensor]:
    """A measure of behaviour: 1 where the answer of the row's class is the likeliest of all after the probed token.

    Args:
        task_data: one probed position a row; the answer would follow it.
        answers: tokens of each class's answer.
        batch_size: rows at a time.
    """
    at = task_data.token_mask.int().argmax(1)
    ids, attention = task_data.inputs["input_ids"], task_data.inputs["attention_mask"]

    @torch.no_grad()
    def measure(model: nn.Module) -> Tensor:
        right = []
        for rows in torch.arange(len(ids)).split(batch_size):
            scores = torch.stack([_log_p(model, ids[rows], attention[rows], at[rows], answer) for answer in answers], 1)
            right.append((scores.argmax(1) == task_data.labels[rows]).float())
        return torch.cat(right)

    return measure


def _log_p(model: nn.Module, ids: Tensor, attention: Tensor, at: Tensor, answer: Sequence[int]) -> Tensor:
    each = torch.arange(len(ids))
    ids, attention = (nn.functional.pad(t, (0, len(answer))) for t in (ids, attention))
    attention = attention * (torch.arange(ids.shape[1]) <= at[:, None])  # what followed the position is not shown
    for offset, token in enumerate(answer):
        ids[each, at + 1 + offset], attention[each, at + 1 + offset] = token, 1
    log_p = model(input_ids=ids, attention_mask=attention, use_cache=False).logits.float().log_softmax(-1)
    return torch.stack([log_p[each, at + offset, token] for offset, token in enumerate(answer)]).sum(0)
