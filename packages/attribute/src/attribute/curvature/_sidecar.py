"""A fitted curvature on disk: ``curvature.safetensors`` with the tensors and ``curvature.json``, written last.

The JSON holds format, version, kind, the capture plan, what was fitted and the SHA-256 of the tensors' file. A folder
without it is unfinished; another version, or tensors of another hash, are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attribute._errors import RunError

if TYPE_CHECKING:
    from attribute.curvature._gram import Gram
    from attribute.curvature._kronecker import Kronecker

ABOUT, TENSORS = "curvature.json", "curvature.safetensors"
_FORMAT, _VERSION = "trace-curvature", 1


def save_tensors(folder: str | Path, kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write both files, each under another name first.

    Raises:
        RunError: a tensor is not finite, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(f"the curvature of {name} is not finite: the model overflows (--precision fp32?)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / TENSORS, lambda path: save_file({n: t.contiguous() for n, t in tensors.items()}, path))
        text = json.dumps(
            {"format": _FORMAT, "version": _VERSION, "kind": kind, "sha256": _hash(folder / TENSORS), **about}, indent=1
        )
        _replace(folder / ABOUT, lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{folder}: the curvature cannot be written ({error.strerror or error})") from error


def load_curvature(folder: str | Path) -> Gram | Kronecker:
    """The curvature that ``trace preconditioners`` or ``trace hessian`` left in a folder.

    Raises:
        RunError: nothing there, an unknown version, or a file that changed.
    """
    from safetensors.torch import load_file

    from attribute.curvature._gram import Gram
    from attribute.curvature._kronecker import Kronecker

    folder = Path(folder)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{folder} holds no finished curvature: make one with trace preconditioners or trace hessian"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / ABOUT} cannot be read: {error}") from error
    if about.get("format") != _FORMAT or about.get("version") != _VERSION:
        raise RunError(
            f"{folder / ABOUT} has format {about.get('format')!r} version {about.get('version')!r}, this version of "
            f"trace reads {_FORMAT!r} version {_VERSION}: fit it again"
        )
    if not (folder / TENSORS).exists() or _hash(folder / TENSORS) != about["sha256"]:
        raise RunError(f"{folder / TENSORS} is not the file that was written (torn or changed): fit it again")
    tensors = load_file(folder / TENSORS)
    return (Gram if about["kind"] == "gram" else Kronecker).from_saved(about, tensors)


def exists(folder: str | Path) -> bool:
    """Whether a finished curvature is there."""
    return (Path(folder) / ABOUT).exists()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
