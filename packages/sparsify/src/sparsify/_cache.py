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
from sparsify._source import OnTheFly, Pair

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
    >>> Trainer(TrainConfig(SaeConfig(k=64)), source=cache.source()).fit()  # doctest: +SKIP

    Calling it again with more data appends; with another model, data or hookpoints it refuses, naming what differs.

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
    header = {
        "format": CACHE_FORMAT,
        "model": source.model_fingerprint(),
        "first_batch": source.checksum(),
        "row_length": source.tokens(0).shape[1],
        "batch_size": batch_size,
        "pairs": pairs,
        "widths": {name: list(widths) for name, widths in source.widths.items()},
    }
    manifest = {**header, "batches": 0, "recipe": recipe or {}}
    if (root / MANIFEST).exists():
        manifest = _read_manifest(root)
        for field, expected in header.items():
            if manifest[field] != expected:
                raise CheckpointError(
                    f"{root} was built with {field}={manifest[field]!r}, now {field}={expected!r}: "
                    "set it back, or build into another folder"
                )
    total = len(source) if max_batches is None else min(max_batches, len(source))
    with _hooks.frozen(model):
        for index in range(manifest["batches"], total):
            progress("computing activations", index, total)
            _write_array(root / "tokens" / _name(index), source.tokens(index).cpu().numpy().astype(np.int32))
            for name, pair in source.batch(index).items():
                _write_array(root / safe_name(name) / _name(index), _words(pair.y))
                if pairs:
                    _write_array(root / name / _name(index, ".in"), _words(pair.x))
            manifest["batches"] = index + 1
            write_json(root / MANIFEST, manifest)
        progress("computing activations", max(manifest["batches"], total), total)
    return ActivationCache(root)


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
            for path, shape in self._promised(index):
                _check_size(path, shape)

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
            raise DataError(f"{self.root} holds outputs only; transcoders need inputs: build it again with pairs=True")
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
        """(rows, tokens) ids of a batch."""
        return torch.from_numpy(np.load(self.root / "tokens" / _name(index)).astype(np.int64))

    def read(self, name: str, index: int, *, inputs: bool = False) -> Tensor:
        """(N, D) bf16 activations of a batch, straight from the memory map."""
        words = np.load(self.root / name / _name(index, ".in" if inputs else ""), mmap_mode="c")
        return torch.from_numpy(words).view(torch.bfloat16)

    def _promised(self, index: int) -> list[tuple[Path, tuple[int, int]]]:
        rows, length = self.manifest["batch_size"], self.manifest["row_length"]
        found = [(self.root / "tokens" / _name(index), (rows * length, 2))]  # int32 is two words
        for name, (d_in, d_out) in self.manifest["widths"].items():
            found.append((self.root / name / _name(index), (rows * length, d_out)))
            if self.manifest["pairs"]:
                found.append((self.root / name / _name(index, ".in"), (rows * length, d_in)))
        return found


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
        self.rank, self.world = shard
        self.device = torch.device("cpu")
        self.exclude = torch.tensor(list(exclude), dtype=torch.long)
        self._block = None
        if len(self) < 1:
            raise DataError(f"{cache.root} holds {len(cache)} batches, fewer than the {self.world} processes")
        widths = {name: cache.manifest["widths"][name] for name in self.hookpoints}
        self.widths = {name: (d_in if transcode else d_out, d_out) for name, (d_in, d_out) in widths.items()}

    def __len__(self) -> int:
        return len(self.cache) // self.world

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


def _check_size(path: Path, shape: tuple[int, int]) -> None:
    expected = shape[0] * shape[1] * 2
    if not path.is_file():
        raise FormatError(f"{path} is missing: build the cache again, which keeps what is there")
    # A header of npy is a multiple of 64 bytes, 128 for these.
    if path.stat().st_size != expected + 128:
        raise FormatError(
            f"{path} has {path.stat().st_size} bytes, expected {expected + 128}: it is torn; delete the cache"
        )


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise FormatError(f"{root} has no {MANIFEST}: it is not an activation cache")
    manifest = json.loads(path.read_text())
    if manifest.get("format") != CACHE_FORMAT:
        raise FormatError(f"{path} has format {manifest.get('format')!r}, this package reads {CACHE_FORMAT}")
    return manifest
