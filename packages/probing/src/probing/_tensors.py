"""Finding the one tensor that matters in what modules take and return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

LINEAR_LIKE = (nn.Linear, Conv1D)


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first floating tensor of a tuple, list, mapping or ModelOutput.

    Blocks of one transformers release return tuples, of the next bare tensors: ``output[0]`` would silently take
    example 0 of the batch.

    >>> first_tensor((torch.ones(2, 3), None)).shape
    torch.Size([2, 3])
    """
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items: Iterator[Any] = iter(value.values() if isinstance(value, Mapping) else ())
    if isinstance(value, tuple | list):
        items = iter(value)
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def replace_first_tensor(value: Any, new: Tensor) -> Any:
    """``value`` with its first floating tensor exchanged for ``new``; tuples and ModelOutputs keep their type."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple | list):
        at = next(i for i, item in enumerate(value) if first_tensor(item) is not None)
        items = [replace_first_tensor(item, new) if i == at else item for i, item in enumerate(value)]
        return type(value)(items) if type(value) in (tuple, list) else type(value)(*items)
    key = next(k for k, item in value.items() if first_tensor(item) is not None)
    copied = value.__class__(value)
    copied[key] = replace_first_tensor(value[key], new)
    return copied


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The residual stream among a block's arguments, wherever the caller put it."""
    found = first_tensor(args)
    return found if found is not None else first_tensor(kwargs.get("hidden_states"))


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], new: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another residual stream."""
    if first_tensor(args) is not None:
        return replace_first_tensor(args, new), kwargs
    return args, {**kwargs, "hidden_states": new}


def copied_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies to call a module with again, any number of times.

    Key-value caches become None, wherever they stand: a filled one would be read, and filled further, by every call.
    """

    def kept(value: Any) -> Any:
        return None if isinstance(value, Cache) else map_tensors(value, torch.clone)

    return tuple(map(kept, args)), {name: kept(value) for name, value in kwargs.items()}


def map_tensors(value: Any, change: Any) -> Any:
    """Apply ``change`` to every tensor in nested tuples, lists and dicts; leave other objects as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map_tensors(item, change) for item in value)
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter, or of the first buffer (all that some quantised layers have); else CPU."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
