"""EleutherAI's layout, this package's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify._coder import SparseCoder
from sparsify._files import WEIGHTS, load_many, safe_name, save_coder
from sparsify.convert._foreign import Options, folders_with


def matches(path: Path, options: Options) -> bool:
    """A folder with sae.safetensors, or of such folders."""
    del options
    return path.is_dir() and bool(folders_with(path, WEIGHTS))


def load(path: Path, options: Options) -> dict[str, SparseCoder]:
    """One coder or many."""
    del options
    return load_many(str(path), True, None, "cpu", True)


def plan(coders: dict[str, SparseCoder], metadata: dict[str, Any], allow_inexact: bool) -> dict[str, SparseCoder]:
    """Every coder can be written."""
    del metadata, allow_inexact
    return coders


def read_by_eleutherai(coder: SparseCoder) -> bool:
    """Whether EleutherAI's own package reads the coder's files and computes the same."""
    return coder.cfg.activation in ("topk", "groupmax") and coder.d_out == coder.d_in


def save(coders: dict[str, SparseCoder], folder: Path, metadata: dict[str, Any], allow_inexact: bool) -> None:
    """A folder per hookpoint."""
    del metadata, allow_inexact
    for name, coder in coders.items():
        save_coder(coder, folder / safe_name(name))
