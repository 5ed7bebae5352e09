"""EleutherAI's layout, this package's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsify._coder import SparseCoder
from sparsify._files import CONFIG, WEIGHTS, load_coder, load_many, safe_name, save_coder
from sparsify.convert._foreign import Options


def matches(path: Path, options: Options) -> bool:
    """A folder with sae.safetensors, or of such folders."""
    del options
    return path.is_dir() and ((path / WEIGHTS).exists() or any(path.glob(f"*/{WEIGHTS}")))


def load(path: Path, options: Options) -> dict[str, SparseCoder]:
    """One coder or many."""
    del options
    if (path / CONFIG).exists():
        return {path.name: load_coder(path)}
    return load_many(str(path), True, None, "cpu", True)


def save(coders: dict[str, SparseCoder], folder: Path, metadata: dict[str, Any], allow_inexact: bool) -> None:
    """A folder per hookpoint."""
    del metadata, allow_inexact
    for name, coder in coders.items():
        save_coder(coder, folder / safe_name(name))
