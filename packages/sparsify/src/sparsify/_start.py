"""Where a run's coders begin: fresh weights from a seed, or the coders of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sparsify._coder import SparseCoder
from sparsify._config import TrainConfig
from sparsify._errors import FormatError
from sparsify._files import load_many


def fresh_coder(cfg: TrainConfig, d_in: int, d_out: int, seed: int) -> SparseCoder:
    """A new coder whose weights depend on the seed alone, and which leaves the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SparseCoder(d_in, cfg.sae, d_out=d_out if cfg.sae.transcode else None)


def start_from(where: str, coders: Mapping[str, SparseCoder]) -> None:
    """Give the coders the weights of those of the same name in a folder or Hub repository.

    Raises:
        FormatError: a coder there has another shape or activation.
    """
    device = next(iter(coders.values())).device
    for name, given in load_many(where, Path(where).is_dir(), list(coders), device, True).items():
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
