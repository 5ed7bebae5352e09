"""Files that a training run continues from: written whole or not at all, and read only by the run they are of."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probing._data import ProbeData
from probing._errors import MaskError


def write(path: Path, blob: Mapping[str, Any]) -> None:
    """Write aside, then rename: a run that dies here leaves the checkpoint before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    torch.save(dict(blob), aside)
    aside.replace(path)


def read(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of this very run.

    Args:
        path: what `write` wrote.
        expected: what says which run it is: plan, config, data, model.

    Raises:
        MaskError: a damaged file, or one of another run; what differs is named.
    """
    try:
        blob: dict[str, Any] = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, OSError) as error:
        raise MaskError(
            f"{path}: not readable as a checkpoint ({_first_line(error)}); delete it to start anew"
        ) from None
    other = [name for name, value in expected.items() if blob.get(name) != value]
    if other:
        raise MaskError(
            f"{path}: this checkpoint is of a run with another {' and another '.join(other)}; delete it or repeat that "
            "run"
        )
    return blob


def identity(plan: Any, config: Mapping[str, Any], data: ProbeData, model: nn.Module) -> dict[str, Any]:
    """What a run is: two with the same identity go the same way."""
    return {"plan": _described(plan), "config": dict(config), "data": _data(data), "model": _weights(model)}


def _described(plan: Any) -> dict[str, Any]:
    """The plan in plain values; schedules by name and numbers, functions by name alone."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return {"kind": type(value).__name__, **asdict(value)}
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}" if callable(value) else value

    return {name: plain(value) for name, value in vars(plan).items()}


def _data(data: ProbeData) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted({**data.inputs, " labels": data.labels, " mask": data.token_mask}.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _weights(model: nn.Module) -> str:
    """A checksum of every weight: sums of their bits as whole numbers, which no order of adding changes."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, Tensor) and tensor.numel():
            bits = tensor.detach().contiguous().view(_WHOLE.get(tensor.element_size(), torch.uint8))
            digest.update(f"{name}{tuple(tensor.shape)}{int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
