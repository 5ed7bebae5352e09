"""Coders on disk: ``{hookpoint}/cfg.json`` and ``{hookpoint}/sae.safetensors``, EleutherAI's layout to the letter.

What EleutherAI's format cannot say (d_out, tied, matryoshka) stands in cfg.json under the one key ``trace``, which
their loader ignores. See docs/sparsify-formats.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from natsort import natsorted
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify._coder import SparseCoder
from sparsify._config import SaeConfig
from sparsify._errors import ConfigError, FormatError

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NOT_CODERS = ("best", "training_state")
"""Folders of a run that hold no published coder."""
FORMAT_VERSION = 1
_HTTP_ERRORS = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)  # of the HTTP library, whichever it is
HUB_ERRORS = (OSError, HFValidationError, EntryNotFoundError, *_HTTP_ERRORS)
"""What the Hub's client raises: for names that cannot be, things that are not there, and no connection."""
_EXTRA = ("tied", "matryoshka")


def config_of(coder: SparseCoder) -> dict[str, Any]:
    """The contents of cfg.json."""
    values = asdict(coder.cfg)
    extra = {name: values.pop(name) for name in _EXTRA}
    return {**values, "d_in": coder.d_in, "trace": {"format": FORMAT_VERSION, "d_out": coder.d_out, **extra}}


def save_coder(coder: SparseCoder, folder: Path) -> None:
    """Write both files, each complete under its name or not there at all."""
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: a tied decoder shares its storage with the encoder, which safetensors rightly refuses.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in coder.state_dict().items()}
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)
    write_json(folder / CONFIG, config_of(coder))


def write_json(path: Path, value: object) -> None:
    """Write JSON by way of a temporary file, so that a reader never meets half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def load_coder(folder: Path, device: str | torch.device = "cpu", decoder: bool = True) -> SparseCoder:
    """Read one coder, checking names, shapes and finiteness."""
    values = _read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    return build_coder(values, tensors, str(folder), device, decoder)


def build_coder(
    values: Mapping[str, Any], tensors: dict[str, Tensor], source: str, device: str | torch.device, decoder: bool = True
) -> SparseCoder:
    """A coder from the contents of its two files."""
    cfg, d_in, d_out = _parse_config(values, source)
    weight = tensors.get("encoder.weight")
    if weight is None:
        raise FormatError(f"{source}: {WEIGHTS} has no encoder.weight, only {', '.join(sorted(tensors))}")
    if weight.shape != (cfg.latents(d_in), d_in):
        raise FormatError(
            f"{source}: {CONFIG} describes an encoder of shape {(cfg.latents(d_in), d_in)}, "
            f"{WEIGHTS} holds {tuple(weight.shape)}: the two files are not of one coder"
        )
    if not decoder:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "W_dec"}
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.ndim}  # scalars are running means, kept in fp32
    dtype = weight.dtype if len(dtypes) == 1 else torch.promote_types(*dtypes) if len(dtypes) == 2 else torch.float32
    try:
        coder = SparseCoder(d_in, cfg, "meta", dtype, d_out=d_out, decoder=decoder)
    except ConfigError as error:
        raise FormatError(f"{source}: {error}") from None
    _check_tensors(coder, tensors, source)
    coder = coder.to_empty(device=device)
    coder.load_state_dict({name: tensor.to(coder.state_dict()[name].dtype) for name, tensor in tensors.items()})
    if cfg.tied and decoder:
        coder.tie()
    return coder.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a torn or missing one is a FormatError."""
    if not path.is_file():
        raise FormatError(f"{path.parent} has no {path.name}{_contents(path.parent)}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} cannot be read ({error}): the file is torn; copy or download it again") from None


def load_from_hub(
    name: str,
    hookpoint: str | None,
    device: str | torch.device,
    decoder: bool,
    revision: str | None = None,
    token: str | None = None,
) -> SparseCoder:
    """One coder of a Hub repository; without a hookpoint the repository's root must hold it."""
    wanted = None if hookpoint is None else f"{safe_name(hookpoint)}/*"
    root = _snapshot(name, wanted, revision, token)
    if hookpoint is None:
        if not (root / CONFIG).exists():
            names = ", ".join(list(_folders(root))[:8])
            raise FormatError(f"{name} holds several coders: give a hookpoint, one of {names}")
        return load_coder(root, device, decoder)
    if not (root / hookpoint / CONFIG).exists():
        raise FormatError(f"{name} has no hookpoint {hookpoint!r}; list them with Sae.load_many or on the Hub")
    return load_coder(root / hookpoint, device, decoder)


def load_many(
    name: str,
    local: bool,
    layers: Iterable[str] | None,
    device: str | torch.device,
    decoder: bool,
    pattern: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, SparseCoder]:
    """Every coder of a repository or folder, in natural order of hookpoint."""
    if local:
        root = Path(name)
        if not root.is_dir():
            raise FormatError(f"{name} is not a folder; for a Hub repository leave out local=True")
    else:
        wanted = None if layers is None else [f"{safe_name(layer)}/*" for layer in layers]
        wanted = f"{pattern}/*" if wanted is None and pattern is not None else wanted
        root = _snapshot(name, wanted, revision, token)
    found = _folders(root)
    if not found and (root / CONFIG).is_file():  # one coder, which is called as its folder or repository
        found = {Path(name).resolve().name: root}
    if layers is not None:
        for layer in layers:
            if layer not in found:
                close = get_close_matches(layer, found, n=3, cutoff=0.4)
                raise FormatError(
                    f"{name} has no hookpoint {layer!r}; close ones: {', '.join(close or list(found)[:5])}"
                )
        found = {layer: found[layer] for layer in natsorted(layers)}
    if pattern is not None:
        found = {hook: path for hook, path in found.items() if fnmatchcase(hook, pattern)}
    if not found:
        what = f"matching {pattern!r}" if pattern is not None else f"({CONFIG} and {WEIGHTS})"
        raise FormatError(f"{name} holds no coder {what}{_contents(root)}")
    return {hook: load_coder(path, device, decoder) for hook, path in found.items()}


def _snapshot(name: str, wanted: str | list[str] | None, revision: str | None, token: str | None) -> Path:
    """The files of a Hub repository, downloaded where they are not in the cache."""
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, revision=revision, token=token))
    except HUB_ERRORS as error:
        if Path(name).is_dir():
            raise FormatError(
                f"{name!r} is a folder here: load it with local=True, or one coder with load_from_disk"
            ) from None
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(f"{name!r} is neither a folder here nor to be had from the Hub: {reason}") from None


def safe_name(hookpoint: str) -> str:
    """A hookpoint as a folder name: never absolute, never upwards."""
    parts = PurePosixPath(hookpoint).parts
    if not parts or ".." in parts or PurePosixPath(hookpoint).is_absolute():
        raise FormatError(f"{hookpoint!r} is not a hookpoint: folder names inside a run may not lead out of it")
    return hookpoint


def _folders(root: Path) -> dict[str, Path]:
    hooks = {p.parent.relative_to(root).as_posix(): p.parent for p in root.rglob(CONFIG)}
    kept = [h for h in hooks if h != "." and PurePosixPath(h).parts[0] not in NOT_CODERS and "/." not in f"/{h}"]
    return {hook: hooks[hook] for hook in natsorted(kept)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        hint = ""
        if folder.is_dir() and _folders(folder):
            hint = (
                f"; it holds coders in subfolders ({', '.join(list(_folders(folder))[:5])}): name one, or use load_many"
            )
        raise FormatError(f"{folder} has no {CONFIG}{hint or _contents(folder)}")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if "d_sae" in values and "trace" not in values and not (folder / WEIGHTS).exists():
        raise FormatError(
            f"{folder} is in the SAELens layout: convert it first with sparsify.convert.load({str(folder)!r})"
        )
    return values


def _parse_config(values: Mapping[str, Any], source: str) -> tuple[SaeConfig, int, int]:
    extra = values.get("trace", {})
    if extra.get("format", FORMAT_VERSION) != FORMAT_VERSION:
        raise FormatError(
            f"{source}: format {extra['format']} is newer than this package's {FORMAT_VERSION}: update it"
        )
    d_in = values.get("d_in")
    if not isinstance(d_in, int):
        raise FormatError(f"{source}: {CONFIG} has no d_in; it is not a sparse coder's")
    # EleutherAI's loader drops unknown keys too: their older files carry `signed` and others.
    if values.get("signed"):
        raise FormatError(
            f"{source}: a coder trained with signed=True keeps negative activations; this package has no such"
        )
    merged = {**values, **extra}
    names = {f.name for f in fields(SaeConfig)}
    try:
        cfg = SaeConfig(**{name: value for name, value in merged.items() if name in names})
        cfg.latents(d_in)
    except (ConfigError, TypeError) as error:
        raise FormatError(f"{source}: {CONFIG} is not usable: {error}") from None
    return replace(cfg, matryoshka=tuple(cfg.matryoshka)), d_in, extra.get("d_out", d_in)


def _check_tensors(coder: SparseCoder, tensors: Mapping[str, Tensor], source: str) -> None:
    expected = coder.state_dict()
    for name in natsorted(set(expected) | set(tensors)):
        if name not in tensors:
            raise FormatError(f"{source}: {WEIGHTS} lacks the tensor {name} of shape {tuple(expected[name].shape)}")
        if name not in expected:
            raise FormatError(f"{source}: {WEIGHTS} holds {name}, which {CONFIG} does not account for")
        if tensors[name].shape != expected[name].shape:
            raise FormatError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise FormatError(f"{source}: {name} holds values that are not finite: the training that wrote it diverged")


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return ": there is no such folder"
    names = sorted(p.name for p in folder.iterdir())[:8]
    return f"; the folder holds {', '.join(names)}" if names else "; the folder is empty"
