"""Rows to train on and rows to score on: drawn at random, then made to hold every class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from probing._errors import DataError


def split(labels: Sequence[Sequence[str]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to score on: a random share, in which classes keep their shares up to chance.

    Then rows change sides until each class with two rows or more is on both, and a class with one row is in training.
    Where the draw did that already, which is the rule, the parts are the same whatever the labels.

    Args:
        labels: one or several labels of each row.
        share: of the rows to score on.
        seed: of the draw.

    Raises:
        DataError: so few rows that a part is empty.
    """
    count = len(labels[0])
    held = round(share * count)
    if not 0 < held < count:
        raise DataError(
            f"--test-share {share} of {count} rows leaves a part empty; name a file of test rows with --test, or give "
            "more rows"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    train, test = _Side(order[held:], labels), _Side(order[:held], labels)
    for which, values in enumerate(labels):
        for name in sorted(set(values)):
            if not train.counts[which][name]:
                _exchange(test, train, which, name)
            elif not test.counts[which][name] and train.counts[which][name] > 1:
                _exchange(train, test, which, name)
    return train.rows, test.rows


class _Side:
    """The rows of one part, and how often each class of each label occurs among them."""

    def __init__(self, rows: list[int], labels: Sequence[Sequence[str]]) -> None:
        self.rows, self.labels = rows, labels
        self.counts = [Counter(values[i] for i in rows) for values in labels]

    def spares(self, row: int, *, except_label: int = -1) -> bool:
        """Whether every class of the row occurs again."""
        labels = enumerate(zip(self.labels, self.counts))
        return all(counts[values[row]] > 1 for which, (values, counts) in labels if which != except_label)

    def give(self, row: int, other: _Side) -> None:
        """Hand a row to the other part."""
        self.rows.remove(row)
        other.rows.append(row)
        for values, mine, theirs in zip(self.labels, self.counts, other.counts):
            mine[values[row]] -= 1
            theirs[values[row]] += 1


def _exchange(giver: _Side, taker: _Side, which: int, name: str) -> None:
    """Give a row of a class that the taker lacks, for one that the taker has twice."""
    values = giver.labels[which]
    given = next((i for i in giver.rows if values[i] == name and giver.spares(i, except_label=which)), None)
    if given is None:
        return
    back = next((i for i in taker.rows if taker.spares(i)), None)
    giver.give(given, taker)
    if back is not None:
        taker.give(back, giver)
