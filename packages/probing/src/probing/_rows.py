"""Trees of cached tensors: which of them have an axis of rows, and taking some rows of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probing._data import ProbeData


@dataclass(frozen=True)
class Rows:
    """A stored tensor whose first axis runs over rows (or probed positions) of the data.

    Some models fold another axis into the first (positions in OPT, heads in Bloom's alibi): ``fold`` entries a row,
    kept here as an axis of its own.
    """

    tensor: Tensor
    fold: int = 1

    def map(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The changed tensor, folded as the model has it."""
        changed = change(self.tensor)
        return changed if self.fold == 1 else changed.flatten(0, 1)


def padded_row(data: ProbeData) -> int | None:
    """A row with padding, if there are rows with and without."""
    for name, tensor in data.inputs.items():
        if name.endswith("attention_mask") and tensor.ndim == 2:
            padded = (tensor == 0).any(1)
            if bool(padded.any()):
                return int(padded.int().argmax())
    return None


def joined(parts: Sequence[Any], two: Any, three: Any, entries: tuple[int, int, int]) -> Any:
    """One tree from the trees of several batches; which tensors have a row axis shows in batches of two and three.

    ``entries``: how many entries of that axis these two batches have, and how many at each part's end are to go.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        fold, rest = divmod(two.shape[0] if first.ndim else 0, entries[0])
        if rest or not fold or three.shape[0] != fold * entries[1]:
            return first
        stacked = torch.cat([part[: len(part) - fold * entries[2]] for part in parts])
        return Rows(stacked if fold == 1 else stacked.unflatten(0, (-1, fold)), fold)
    if isinstance(first, tuple | list):
        items = [joined(column, a, b, entries) for *column, a, b in zip(*parts, two, three)]
        return tuple(items) if isinstance(first, tuple) else items
    if isinstance(first, dict):
        return {key: joined([p[key] for p in parts], two[key], three[key], entries) for key in first}
    return first


def map_rows(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tree with its `Rows` changed and folded back into plain tensors."""
    if isinstance(tree, Rows):
        return tree.map(change)
    if isinstance(tree, tuple):
        return tuple(map_rows(item, change) for item in tree)
    if isinstance(tree, list):
        return [map_rows(item, change) for item in tree]
    if isinstance(tree, dict):
        return {key: map_rows(item, change) for key, item in tree.items()}
    return tree


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold equal tensors, bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a is None and b is None


def common_path(paths: Sequence[str]) -> str:
    """The path of the smallest module around all of these."""
    parts = [path.split(".") for path in paths]
    shared = []
    for names in zip(*parts):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
