"""A run folder: published coders in EleutherAI's layout, and the training state that makes resuming exact.

    {save_dir}/{run_name}/
      config.json                    the TrainConfig
      metrics.jsonl                  one line per logging interval
      {hookpoint}/cfg.json, sae.safetensors
      best/{hookpoint}/...           with save_best
      training_state/latest          the number of the newest whole state
      training_state/step_{n}/rank_{r}.pt

Every file is written under a temporary name and renamed, and ``latest`` is replaced only when all ranks' states stand:
a run killed at any moment resumes from a whole state.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from sparsify._coder import SparseCoder
from sparsify._config import TrainConfig
from sparsify._errors import CheckpointError
from sparsify._parallel import Processes

STATE = "training_state"
# Fields that say where and how often things are written, not what is learned: a resumed run may change them.
_FREE = ("save_dir", "run_name", "save_every", "save_best", "log_every", "log_to", "log_to_wandb", "finetune")
_PARTS = ("step", "tokens_seen", "config", "data", "coders", "optimiser", "tokens_since_fired", "best", "metrics")


def described(cfg: TrainConfig) -> dict[str, Any]:
    """What of a configuration a resumed run must share."""
    return {name: value for name, value in asdict(cfg).items() if name not in _FREE}


def published(coder: SparseCoder, k: int) -> SparseCoder:
    """The coder as it is published while a schedule sets k: its file says the k it was trained with."""
    if k == coder.cfg.k:
        return coder
    twin = SparseCoder(coder.d_in, replace(coder.cfg, k=k), "meta", coder.dtype, d_out=coder.d_out)
    twin.load_state_dict(coder.state_dict(), assign=True)
    return twin


def write_state(folder: Path, step: int, state: Mapping[str, Any], processes: Processes) -> None:
    """Keep this process's state; when all have, make it the latest and drop older ones."""
    home = folder / STATE / f"step_{step}"
    home.mkdir(parents=True, exist_ok=True)
    temporary = home / f".rank_{processes.rank}.tmp"
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, home / f"rank_{processes.rank}.pt")
    processes.barrier()
    if processes.first:
        pointer = folder / STATE / ".latest.tmp"
        pointer.write_text(str(step))
        os.replace(pointer, folder / STATE / "latest")
        for other in (folder / STATE).glob("step_*"):
            if other != home:
                shutil.rmtree(other)
    processes.barrier()


def read_state(folder: Path, device: torch.device, processes: Processes) -> dict[str, Any]:
    """This process's part of the latest state."""
    pointer = folder / STATE / "latest"
    if not pointer.is_file():
        raise CheckpointError(
            f"{folder} has no {STATE}/latest, so there is nothing to resume: check run_name and save_dir, "
            "or train without --resume"
        )
    home = folder / STATE / f"step_{pointer.read_text().strip()}"
    saved = len(list(home.glob("rank_*.pt")))
    if not saved:
        raise CheckpointError(f"{pointer} points to {home}, which holds no state: resume from a copy, or start again")
    if saved != processes.world:
        raise CheckpointError(f"{home} was written by {saved} processes, this run has {processes.world}: use as many")
    try:
        state = torch.load(home / f"rank_{processes.rank}.pt", map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{home} cannot be read ({reason}): resume from a copy, or start again") from None
    if not isinstance(state, dict) or not set(_PARTS) <= set(state):
        raise CheckpointError(f"{home} does not hold the state of a run: resume from a copy, or start again")
    return state


def check_same(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue a run as a different one, naming the first field that differs."""
    for name in [*current, *saved]:
        old, new = _plain(saved.get(name)), _plain(current.get(name))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_same(old, new)
        elif old != new:
            raise CheckpointError(
                f"the run was started with {name}={old!r}, and is now resumed with {name}={new!r}: "
                f"set {name} back, or start a run of another name"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
