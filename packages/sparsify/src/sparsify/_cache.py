"""Activations on disk: computed once, trained on many times.

    {folder}/manifest.json           what they are: model, data, hookpoints, widths, finished batches
    {folder}/tokens/00000000.npy     token ids of a batch, kept so that exclusion can be decided later
    {folder}/{hookpoint}/00000000.npy   (N, D) bf16 outputs as 16-bit words, memory-mapped when read
    {folder}/{hookpoint}/00000000.in.npy   (N, D_in) inputs, with pairs

One file per batch and hookpoint. A batch counts once the manifest says so, and the manifest is replaced after the
batch's files stand: a build killed at any moment goes on where it was, and nothing finished is lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradcore import SelectionError, select_modules
from sparsify import _hooks
from sparsify._config import TrainConfig
from sparsify._errors import CheckpointError, ConfigError, DataError, FormatError, HookpointError
from sparsify._files import safe_name, write_json
from sparsify._progress import Stages, silent
from sparsify._source import OnTheFly, Pair, check_finite, limited, warn_of_end

MANIFEST, CACHE_FORMAT = "manifest.json", 1


def build_cache(
    folder: str | Path,
    model: nn.Module,
    dataset: Any,
    hookpoints: Sequence[str] = (),
    *,
    batch_size: int = 32,
    pairs: bool = False,
    max_batches: int | None = None,
    recipe: dict[str, Any] | None = None,
    progress: Stages = silent,
) -> ActivationCache:
    """Compute and keep the activations of a dataset, or go on doing so.

    >>> cache = build_cache("cache", model, tokenized, ["layers.3"])  # doctest: +SKIP
    >>> cfg = TrainConfig(SaeConfig(k=64), exclude_tokens=[0])  # doctest: +SKIP
    >>> Trainer(cfg, source=cache.source_for(cfg)).fit()  # doctest: +SKIP

    Calling it again with more data appends, and makes anew what is missing or torn; with another model, data or
    hookpoints it refuses, naming what differs. Rows that fill no whole batch are left for when there are more.

    Args:
        hookpoints: patterns relative to the base model; every layer by default.
        batch_size: rows per file, and later per training batch.
        pairs: keep inputs as well as outputs, for transcoders.
        max_batches: stop early.
        recipe: how model and data came about, kept in the manifest.
        progress: called with the stage, batches done, and of how many.
    """
    root = Path(folder)
    names = _hooks.find_hookpoints(model, hookpoints)
    source = OnTheFly(model, dataset, names, transcode=pairs, batch_size=batch_size)
    manifest = _manifest(root, source, recipe or {})
    total, done = limited(len(source), max_batches), manifest["batches"]
    with _hooks.frozen(model):
        for index in range(total):
            if not source.reaches(index):
                warn_of_end(source, f"so the cache holds {max(done, index)} batches")
                break
            if index < done and _is_kept(root, manifest, source, index):
                continue
            progress("computing activations", index, total)
            _write_batch(root, source, index)
            manifest["batches"] = max(done, index + 1)
            write_json(root / MANIFEST, manifest)
        progress("computing activations", max(manifest["batches"], total), total)
    return ActivationCache(root)


def _manifest(root: Path, source: OnTheFly, recipe: dict[str, Any]) -> dict[str, Any]:
    """A new manifest, or the one that is there if it is of the same activations."""
    header = {
        "format": CACHE_FORMAT,
        "model": source.model_fingerprint(),
        "first_batch": source.checksum(),
        "row_length": source.tokens(0)[0].numel(),
        "batch_size": source.batch_size,
        "pairs": bool(source.transcode),
        "widths": {name: list(widths) for name, widths in source.widths.items()},
    }
    if not (root / MANIFEST).exists():
        return {**header, "batches": 0, "recipe": recipe}
    manifest = _read_manifest(root)
    for field, expected in header.items():
        if manifest[field] != expected:
            raise CheckpointError(
                f"{root} was built with {field}={manifest[field]!r}, now {field}={expected!r}: "
                "set it back, or build into another folder"
            )
    return manifest


def _is_kept(root: Path, manifest: dict[str, Any], source: OnTheFly, index: int) -> bool:
    """Whether a finished batch is there and whole, and of these very rows."""
    path = root / "tokens" / _name(index)
    if any(_fault(*each) for each in _promised(root, manifest, index)):
        return False
    if not np.array_equal(np.load(path), _ids(source.tokens(index))):
        raise CheckpointError(
            f"{root} holds batch {index} of other rows than the dataset's {index * source.batch_size} to "
            f"{(index + 1) * source.batch_size - 1}: give the rows it was built from, or build into another folder"
        )
    return True


def _write_batch(root: Path, source: OnTheFly, index: int) -> None:
    _write_array(root / "tokens" / _name(index), _ids(source.tokens(index)))
    for name, pair in source.batch(index).items():
        check_finite(pair, name, index)
        _write_array(root / safe_name(name) / _name(index), _words(pair.y))
        if source.transcode:
            _write_array(root / name / _name(index, ".in"), _words(pair.x))


class ActivationCache:
    """A finished or growing cache, opened for reading.

    Args:
        folder: what `build_cache` wrote.

    Raises:
        FormatError: the manifest is missing or of another version, or a file it promises is missing or torn.
    """

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder)
        self.manifest = _read_manifest(self.root)
        self.hookpoints: list[str] = list(self.manifest["widths"])
        for index in range(len(self)):
            for each in _promised(self.root, self.manifest, index):
                if fault := _fault(*each):
                    raise FormatError(f"{fault}: build the cache again from the same rows, which makes it anew")

    def __len__(self) -> int:
        return self.manifest["batches"]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.root.rglob("*.npy"))

    def source(
        self,
        *,
        transcode: bool = False,
        hookpoints: Sequence[str] | None = None,
        exclude: Sequence[int] = (),
        max_norm_ratio: float = 0.0,
        buffer_batches: int = 1,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> CachedSource:
        """The cache as a training source, under the exclusion and mixing options of `TrainConfig`."""
        if transcode and not self.manifest["pairs"]:
            raise DataError(
                f"{self.root} holds outputs only; transcoders need inputs: build it again with pairs=True (--pairs)"
            )
        chosen = self.hookpoints if hookpoints is None else list(hookpoints)
        for name in chosen:
            if name not in self.hookpoints:
                raise DataError(f"{self.root} does not hold {name!r}, only {', '.join(self.hookpoints[:8])}")
        return CachedSource(self, chosen, transcode, exclude, max_norm_ratio, buffer_batches, seed, shard)

    def source_for(self, cfg: TrainConfig, shard: tuple[int, int] = (0, 1)) -> CachedSource:
        """The cache as a training configuration wants it: its hookpoints, exclusions and mixing.

        ``shard`` is (process, processes): each reads its own batches.
        """
        if cfg.loss_fn != "fvu":
            raise ConfigError(f"loss_fn={cfg.loss_fn!r} runs the model, which a cache stands in for: train without it")
        if cfg.layers or cfg.layer_stride != 1:
            raise ConfigError("a cache has no layer numbers: choose with hookpoints")
        names = self.hookpoints
        if cfg.hookpoints:
            try:
                names = select_modules(self.hookpoints, list(cfg.hookpoints))
            except SelectionError as error:
                raise HookpointError(f"{self.root}: {error}") from None
        return self.source(
            transcode=cfg.sae.transcode,
            hookpoints=names,
            exclude=cfg.exclude_tokens,
            max_norm_ratio=cfg.max_norm_ratio,
            buffer_batches=cfg.buffer_batches,
            shard=shard,
        )

    def tokens(self, index: int) -> Tensor:
        """(rows, tokens) ids of a batch, or its rows of real numbers."""
        rows = torch.from_numpy(np.load(self.root / "tokens" / _name(index)))
        return rows if rows.is_floating_point() else rows.long()

    def read(self, name: str, index: int, *, inputs: bool = False) -> Tensor:
        """(N, D) bf16 activations of a batch, straight from the memory map."""
        words = np.load(self.root / name / _name(index, ".in" if inputs else ""), mmap_mode="c")
        return torch.from_numpy(words).view(torch.bfloat16)


class CachedSource(OnTheFly):
    """`OnTheFly` without a model: the same exclusion, mixing and order, read instead of computed."""

    def __init__(
        self,
        cache: ActivationCache,
        hookpoints: Sequence[str],
        transcode: bool,
        exclude: Sequence[int],
        max_norm_ratio: float,
        buffer_batches: int,
        seed: int,
        shard: tuple[int, int],
    ) -> None:
        self.cache, self.hookpoints, self.transcode = cache, list(hookpoints), transcode
        self.batch_size = cache.manifest["batch_size"]
        self.max_norm_ratio, self.buffer_batches, self.seed = max_norm_ratio, buffer_batches, seed
        (self.rank, self.world), self.keep_last = shard, False
        self.device = torch.device("cpu")
        self.exclude = torch.tensor(list(exclude), dtype=torch.long)
        self._block = None
        if self.exclude.numel() and len(cache) and cache.tokens(0).is_floating_point():
            raise DataError(f"{cache.root} holds no token ids, so exclude_tokens has nothing to name: leave it out")
        if len(self) < 1:
            raise DataError(f"{cache.root} holds {len(cache)} batches, fewer than the {self.world} processes")
        widths = {name: cache.manifest["widths"][name] for name in self.hookpoints}
        self.widths = {name: (d_in if transcode else d_out, d_out) for name, (d_in, d_out) in widths.items()}

    def __len__(self) -> int:
        return len(self.cache) // self.world

    def reaches(self, index: int) -> bool:
        """Whether there is a batch ``index``."""
        return index < len(self)

    def tokens(self, index: int) -> Tensor:
        """The (rows, tokens) ids of batch ``index``."""
        return self.cache.tokens(index * self.world + self.rank)

    def fingerprint(self) -> str:
        """The manifest, and with it the length: a cache that has grown since has another schedule."""
        told = {k: v for k, v in self.cache.manifest.items() if k != "recipe"}
        return json.dumps(told, sort_keys=True)

    def _computed(self, index: int) -> dict[str, Pair]:
        place = index * self.world + self.rank
        keep = ~torch.isin(self.tokens(index), self.exclude).flatten() if self.exclude.numel() else None
        found: dict[str, Pair] = {}
        for name in self.hookpoints:
            y = self.cache.read(name, place)
            x = self.cache.read(name, place, inputs=True) if self.transcode else None
            found[name] = self._pair(_hooks.Site(x, y), keep, name, index)
        return found


def _words(x: Tensor) -> np.ndarray[Any, Any]:
    return x.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy()


def _ids(rows: Tensor) -> np.ndarray[Any, Any]:
    found = rows.cpu()
    return found.float().numpy() if found.is_floating_point() else found.int().numpy()


def _name(index: int, suffix: str = "") -> str:
    return f"{index:08d}{suffix}.npy"


def _write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _promised(root: Path, manifest: dict[str, Any], index: int) -> list[tuple[Path, int, int]]:
    """A batch's files, with the number of vectors that most modules yield, and the 16-bit words of each."""
    vectors = manifest["batch_size"] * manifest["row_length"]
    found = [(root / "tokens" / _name(index), vectors, 2)]
    for name, (d_in, d_out) in manifest["widths"].items():
        found.append((root / name / _name(index), vectors, d_out))
        if manifest["pairs"]:
            found.append((root / name / _name(index, ".in"), vectors, d_in))
    return found


def _fault(path: Path, vectors: int, width: int) -> str:
    """What is wrong with a file; nothing, usually."""
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    # A header of npy is a multiple of 64 bytes, 128 for these. Other sizes are asked of the header: a pooled module
    # yields one vector per row, an expert as many as are routed to it.
    if size == 128 + 2 * vectors * width:
        return ""
    try:
        shape = np.load(path, mmap_mode="r").shape
    except (ValueError, OSError, EOFError):
        return f"{path} has {size} bytes and is torn"
    if shape[-1] != width:
        return f"{path} holds vectors of width {shape[-1]}, not {width}"
    return ""


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise FormatError(f"{root} has no {MANIFEST}: it is not an activation cache")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != CACHE_FORMAT:
        raise FormatError(f"{path} has format {manifest.get('format')!r}, this package reads {CACHE_FORMAT}")
    return manifest
