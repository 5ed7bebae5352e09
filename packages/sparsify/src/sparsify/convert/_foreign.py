"""What the layouts share: reading files safely, building coders, and explaining refusals."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from natsort import natsorted
from torch import Tensor

from sparsify._coder import SparseCoder
from sparsify._config import SaeConfig
from sparsify._errors import FormatError
from sparsify._files import read_tensors


@dataclass(frozen=True)
class Options:
    """How `sparsify.convert.load` was called."""

    allow_pickle: bool = False
    dict_class: str | None = None
    act_mean: str | None = None


def make(cfg: SaeConfig, tensors: dict[str, Tensor], source: str, *, bandwidth: float = 0.05) -> SparseCoder:
    """A coder from its parameters; checks shapes and finiteness."""
    weight = tensors["encoder.weight"]
    latents, d_in = weight.shape
    coder = SparseCoder(d_in, cfg, dtype=weight.dtype, d_out=tensors["b_dec"].shape[0])
    if cfg.activation == "jumprelu":
        tensors = {**tensors, "bandwidth": torch.tensor(bandwidth)}
    expected = coder.state_dict()
    if set(expected) != set(tensors):
        raise FormatError(f"{source}: expected the parameters {sorted(expected)}, found {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise FormatError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{source}: {name} holds values that are not finite")
    assert latents == coder.num_latents
    coder.load_state_dict(tensors)
    return coder.eval()


def folders_with(path: Path, file: str) -> dict[str, Path]:
    """The folders that hold a file, by name: ``path`` itself by its own, or those within it, naturally sorted."""
    if (path / file).is_file():
        return {path.resolve().name: path}
    found = {p.parent.relative_to(path).as_posix(): p.parent for p in path.rglob(file)}
    return {name: found[name] for name in natsorted(found)}


def read_pickle(path: Path, allowed: bool) -> dict[str, Any]:
    """A torch file, tensors and plain values only."""
    if not allowed:
        raise FormatError(
            f"{path} is a pickle, which is read only on request: pass allow_pickle=True (even then, "
            "tensors and plain values alone are accepted)"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise FormatError(f"{path} cannot be read as tensors and plain values: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected names and tensors")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None


def unit_rows(weight: Tensor) -> bool:
    """Whether all rows have length one, to the precision of half-precision files."""
    return bool(((weight.float().norm(dim=1) - 1).abs() < 1e-2).all())


def refuse(name: str, why: str, layout: str) -> FormatError:
    """The error for a coder a layout cannot express."""
    return FormatError(f"{name} cannot be written in the {layout} layout: {why}")


def why_not(path: Path, allow_pickle: bool) -> str:
    """Why a path is of no known layout."""
    known = "sparsify, saelens, dictionary_learning and circuit_tracer"
    names = _names_inside(path, allow_pickle)
    if {"encoder_weights", "decoder_weights", "pre_bias"} <= names:
        return (
            f"{path} is a TopK file whose names are of no library (encoder_weights, pre_bias): it records neither k "
            "nor whether a ReLU precedes the top-k, so its activations cannot be known"
        )
    if names == {"W_enc", "b_enc", "W_dec", "b_dec"}:
        return (
            f"{path} holds W_enc, b_enc, W_dec and b_dec without a configuration: the activation, the orientation and "
            "whether b_dec is subtracted from inputs cannot be known from weights"
        )
    told = f"; it holds {', '.join(sorted(names)[:8])}" if names else ""
    return f"{path} is of none of the layouts {known}{told}"


def _names_inside(path: Path, allow_pickle: bool) -> set[str]:
    if path.is_dir():
        return {p.name for p in path.iterdir()}
    if path.suffix == ".safetensors":
        return set(read_tensors(path))
    return set(read_pickle(path, allow_pickle)) if path.suffix in (".pt", ".pth") else set()
