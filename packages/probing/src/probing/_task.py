"""A probing task from rows: texts, a label column, a rule for the position looked at, and two parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from probing._data import ProbeData, last_token_mask
from probing._errors import DataError
from probing._place import Position
from probing._split import split
from probing._table import Table


@dataclass(frozen=True)
class TextTask:
    """Rows ready to probe.

    Attributes:
        train: rows the probe learns from.
        test: rows it is scored on.
        names: the label each class number stands for.
        places: where train and test rows stand in their files.
        left_out: rows without a value, left out of the files.
    """

    train: ProbeData
    test: ProbeData
    names: list[str]
    places: tuple[list[str], ...]
    left_out: int = 0

    def to(self, device: torch.device | str) -> TextTask:
        """The same rows on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


@dataclass(frozen=True)
class Reading:
    """How a text becomes tokens, and which of them is probed.

    Attributes:
        text: the column of texts.
        position: ``"last"``, ``"first"``, a token index (negative from the end), or ``"word:COLUMN"``: the last token
            of the word that column names, where it first stands as a whole word in the text.
        max_length: most tokens a row may have; None for any number.
        context: what the model takes; ``max_length`` may be less.
        cut: cut longer texts at ``max_length`` instead of refusing them.
    """

    text: str = "text"
    position: str = "last"
    max_length: int | None = None
    context: int | None = None
    cut: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns read."""
        return [self.text, *([self.position[5:]] if self.position.startswith("word:") else [])]


def load_task(rows: Sequence[dict[str, Any]] | Table, tokenizer: Any, *, label: str, **how: Any) -> TextTask:
    """The task of one label; the rest as in `load_tasks`."""
    return load_tasks(rows, tokenizer, labels=[label], **how)[0]


def load_tasks(
    rows: Sequence[dict[str, Any]] | Table,
    tokenizer: Any,
    *,
    labels: Sequence[str],
    reading: Reading | None = None,
    test_rows: Sequence[dict[str, Any]] | Table | None = None,
    test_share: float = 0.25,
    skip_missing: bool = False,
    seed: int = 0,
) -> list[TextTask]:
    """Tokenise, place the probe, number the labels, split: a task a label, all with the same rows and positions.

    Args:
        rows: named columns.
        tokenizer: a Hugging Face tokenizer.
        labels: the columns of labels: strings, numbers or booleans.
        reading: how texts become tokens.
        test_rows: rows to score on; otherwise a random share of the rows, see `split`.
        test_share: that share.
        skip_missing: leave out rows that lack a text, a word to probe or one of the labels, instead of refusing them.
        seed: of the split.

    Raises:
        DataError: columns that are absent, rows without a value, texts too long, positions outside a text, one class
            only, or an empty part.
    """
    reading = reading or Reading()
    tables = [Table.of(rows)] if test_rows is None else [Table.of(rows), Table.of(test_rows, "the test rows")]
    total = sum(map(len, tables))
    if skip_missing:
        tables = [table.complete([*reading.columns, *labels]) for table in tables]
    left_out = total - sum(map(len, tables))
    values = {label: [_class_names(table, label) for table in tables] for label in labels}
    for label, (train, *_) in values.items():
        _check_several(train, label, tables[0].name)
    if test_rows is None:
        sides = split([each[0] for each in values.values()], test_share, seed)
        values = {label: [[each[0][i] for i in side] for side in sides] for label, each in values.items()}
        tables = [tables[0].take(side) for side in sides]
    parts = [_tokenise(table, tokenizer, reading) for table in tables]
    places = tuple(table.places for table in tables)
    tasks = []
    for label, (train, test) in values.items():
        names = _order(set(train))
        _check_scored(test, names, label, tables[1], test_rows is not None)
        data = [
            ProbeData(inputs, torch.tensor([names.index(name) for name in part]), mask)
            for (inputs, mask), part in zip(parts, (train, test))
        ]
        tasks.append(TextTask(data[0], data[1], names, places, left_out))
    return tasks


def _class_names(table: Table, label: str) -> list[str]:
    """The labels as text: booleans as JSON spells them, 1.0 as 1."""
    names = []
    for value, place in zip(table.column(label), table.places):
        if not isinstance(value, str | int | float):
            raise DataError(f"{place}: the label {label!r} is a string, a number or a boolean, not {value!r}")
        if isinstance(value, bool):
            names.append(str(value).lower())
        else:
            names.append(str(int(value)) if isinstance(value, float) and value.is_integer() else str(value))
    return names


def _order(names: set[str]) -> list[str]:
    """Sorted as numbers if all are numbers, else as text."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return sorted(names)
    return sorted(names, key=lambda name: (numbers[name], name) if isfinite(numbers[name]) else (inf, name))


def _check_several(values: Sequence[str], label: str, rows: str, hint: str = "name another column") -> None:
    if len(set(values)) == 1:
        raise DataError(
            f"label {label!r}: all {len(values)} rows of {rows} are {values[0]!r}, and with one class there is nothing "
            f"to tell apart; {hint}"
        )


def _check_scored(values: Sequence[str], names: Sequence[str], label: str, table: Table, given: bool) -> None:
    for name, place in zip(values, table.places):
        if name not in names:
            raise DataError(f"{place}: label {label!r} is {name!r}, which occurs never in the training rows")
    if given:
        return _check_several(values, label, table.name, "give rows of other classes, too")
    hint = "give two rows or more of each class, try another --seed or --test-share, or name rows with --test"
    return _check_several(values, label, f"the test part of {table.name}", hint)


def _tokenise(table: Table, tokenizer: Any, reading: Reading) -> tuple[Mapping[str, Tensor], Tensor]:
    texts = [str(value) for value in table.column(reading.text)]
    encoded = [_encode(text, place, tokenizer, reading) for text, place in zip(texts, table.places)]
    lengths = [len(row["input_ids"]) for row in encoded]
    width = max(lengths)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # Right padding whatever the tokenizer prefers: positions then count from the start of each text.
    ids = torch.tensor([row["input_ids"] + [pad] * (width - n) for row, n in zip(encoded, lengths)])
    attention = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    inputs = {"input_ids": ids, "attention_mask": attention}
    if reading.position == "last":
        return inputs, last_token_mask(ids, attention)
    at = Position(reading.position, table)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for number, (row, text) in enumerate(zip(encoded, texts)):
        mask[number, at.of(number, row, text)] = True
    return inputs, mask


def _encode(text: str, place: str, tokenizer: Any, reading: Reading) -> Any:
    offsets = {"return_offsets_mapping": reading.position.startswith("word:")}
    try:
        row = tokenizer(text, verbose=False, **offsets)
    except NotImplementedError:
        raise DataError("this tokenizer does not say where tokens stand in a text: give --position an index") from None
    length, most = len(row["input_ids"]), reading.max_length
    if not length:
        raise DataError(f"{place}: the text has no tokens, so there is nothing to probe")
    if most is None or length <= most:
        return row
    if reading.cut:
        return tokenizer(text, truncation=True, max_length=most, **offsets)
    more = reading.context is None or most < reading.context
    longer = f", or --max-length {min(length, reading.context or length)}" if more else ""
    raise DataError(
        f"{place}: {length} tokens, but {'--max-length is' if more else 'the model takes'} {most}; shorten the text, "
        f"or type --cut to keep the first {most}{longer}"
    )
