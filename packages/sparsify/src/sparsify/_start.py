"""Before the first step: whether configuration and data agree, and where coders begin: a seed, or another run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradcore import SelectionError, select_modules
from sparsify._coder import SparseCoder
from sparsify._config import TrainConfig
from sparsify._errors import ConfigError, FormatError, HookpointError, SparsifyWarning
from sparsify._files import CONFIG, load_coder, load_many
from sparsify._hooks import find_hookpoints
from sparsify._parallel import Processes
from sparsify._source import OnTheFly, Pair, Source
from sparsify.activations import Activation


def source_for(
    cfg: TrainConfig, dataset: Any, model: nn.Module | None, source: Source | None, shard: tuple[int, int]
) -> Source:
    """The source given, if it is what the configuration says, or the dataset's activations by the model."""
    if source is not None:
        check_agrees(cfg, source)
        return source
    if model is None or dataset is None:
        raise ConfigError("give either a dataset and a model, or a source of activations")
    return OnTheFly(
        model,
        dataset,
        find_hookpoints(model, cfg.hookpoints, cfg.layers, cfg.layer_stride),
        transcode=cfg.sae.transcode,
        batch_size=cfg.batch_size,
        exclude=cfg.exclude_tokens,
        max_norm_ratio=cfg.max_norm_ratio,
        buffer_batches=cfg.buffer_batches,
        shard=shard,
    )


def check_agrees(cfg: TrainConfig, source: Source) -> None:
    """Refuse a configuration that says of the data what a source given beside it does not do.

    Raises:
        ConfigError: a field differs; the message says what the source does.
        HookpointError: ``hookpoints`` match nothing that the source holds.
    """
    names = list(source.widths)
    if cfg.loss_fn != "fvu":
        raise ConfigError(
            f"loss_fn={cfg.loss_fn!r} runs the model, which a source stands in for: give dataset and model"
        )
    if cfg.layers or cfg.layer_stride != 1:
        raise ConfigError(f"a source has no layer numbers: choose with hookpoints among {', '.join(names[:8])}")
    if cfg.hookpoints:
        try:
            chosen = select_modules(names, list(cfg.hookpoints))
        except SelectionError as error:
            raise HookpointError(f"the source: {error}") from None
        if set(chosen) != set(names):
            _disagree("hookpoints", list(cfg.hookpoints), names)
    if isinstance(source, OnTheFly):
        mine = {"batch_size": cfg.batch_size, "transcode": cfg.sae.transcode, "buffer_batches": cfg.buffer_batches}
        mine |= {"exclude_tokens": sorted(cfg.exclude_tokens), "max_norm_ratio": cfg.max_norm_ratio}
        theirs = {"batch_size": source.batch_size, "transcode": bool(source.transcode)}
        theirs |= {"buffer_batches": source.buffer_batches, "exclude_tokens": sorted(source.exclude.tolist())}
        theirs |= {"max_norm_ratio": source.max_norm_ratio}
        for field, value in mine.items():
            if value != theirs[field]:
                _disagree(field, value, theirs[field])


def _disagree(field: str, mine: object, theirs: object) -> None:
    raise ConfigError(
        f"{field}={mine!r}, but the source was made with {field}={theirs!r}: set {field} so, "
        "or make the source with ActivationCache.source_for(cfg)"
    )


def check_cuts(cfg: TrainConfig, activation: Activation, replicas: int, *, first: bool) -> None:
    """Refuse to cut a batch, from which latents are chosen, into chunks; processes choose from their own parts."""
    if activation.cuttable:
        return
    name = cfg.sae.activation
    if cfg.micro_acc_steps > 1:
        raise ConfigError(
            f"micro_acc_steps={cfg.micro_acc_steps} cuts the batch that {name} chooses its latents from: use a smaller "
            "batch_size with grad_acc_steps"
        )
    if replicas > 1 and first:
        warnings.warn(
            f"{name} chooses its latents among the tokens of one process, not of all {replicas}: for one choice over "
            "the whole batch set distribute_modules",
            SparsifyWarning,
            stacklevel=4,
        )


def fresh_coder(cfg: TrainConfig, d_in: int, d_out: int, seed: int) -> SparseCoder:
    """A new coder whose weights depend on the seed alone, and which leaves the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SparseCoder(d_in, cfg.sae, d_out=d_out if cfg.sae.transcode else None)


def initialise(coder: SparseCoder, pair: Pair, replicas: Processes | None) -> None:
    """Start from the whole first batch, whichever process holds it."""
    if replicas is None:
        coder.initialise(pair.x, pair.y)
        return
    x, y = replicas.gather_rows(pair.x, 0), replicas.gather_rows(pair.y, 0)
    if replicas.first:
        coder.initialise(x, y)
    replicas.broadcast_(*coder.state_dict().values())


def start_from(where: str, coders: Mapping[str, SparseCoder]) -> None:
    """Give the coders the weights of those of the same name in a folder or Hub repository.

    Raises:
        FormatError: a coder there has another shape or activation.
    """
    device, folder = next(iter(coders.values())).device, Path(where)
    if len(coders) == 1 and (folder / CONFIG).is_file():  # one coder, whatever its folder is called
        found = dict.fromkeys(coders, load_coder(folder, device))
    else:
        found = load_many(where, folder.is_dir(), list(coders), device, True)
    for name, given in found.items():
        mine = coders[name]
        if _signature(given) != _signature(mine):
            raise FormatError(
                f"finetune={where!r}: {name} is a {_described(given)}, this run trains a {_described(mine)}: "
                "set --num_latents, --activation, --transcode and --skip_connection as they were"
            )
        mine.load_state_dict(given.state_dict())


def _signature(coder: SparseCoder) -> tuple[object, ...]:
    shapes = {key: tuple(value.shape) for key, value in coder.state_dict().items()}
    return shapes, coder.cfg.activation, coder.cfg.transcode


def _described(coder: SparseCoder) -> str:
    kind = "transcoder" if coder.cfg.transcode else "autoencoder"
    skip = " with a skip connection" if coder.cfg.skip_connection else ""
    return f"{coder.cfg.activation} {kind} {coder.d_in} → {coder.num_latents} → {coder.d_out}{skip}"
