"""The folder of a run: what may be written, continued or replaced, and the tokens that lie beside it meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from attribute._errors import RunError
from attribute.config import IndexConfig
from attribute.processes import current
from gradstore import GradientStore

_MANIFEST, _CONFIG, _REPORT = "manifest.json", "config.yaml", "report.html"
RECORDS = "records.jsonl"
# A writer that dies before its manifest is there leaves these.
_UNBORN = {"writer.lock", "journal.jsonl", "shards", "data", "parts"}
# All that trace puts into a run folder; anything else is somebody's, and never deleted.
_OURS = _UNBORN | {_MANIFEST, _CONFIG, _REPORT, "basis.safetensors", "normalizer.safetensors", "offsets.npy"}
_TOKENS = {RECORDS, "ids.bin", "labelled.bin", "offsets.bin", "tokens.json", "lock"}
# Where things come from, not what they are: a folder may move while a run rests. What they hold is compared by hash.
_PROVENANCE = {
    "processor_path",
    "optimizer_state_path",
    "model",
    "tokenizer",
    "revision",
    "device",
    "fsdp",
    "dataset",
    "subset",
    "split",
    "data_args",
    "streaming",
}


def refuse_finished(path: str | Path, overwrite: bool) -> None:
    """Raise :class:`RunError` early where a run could not be written, before anything is loaded."""
    path = Path(path)
    if not current().first:  # which looks before any other can have begun
        return
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a run folder")
    if not path.exists() or not any(path.iterdir()):
        return
    if not _is_run(path):
        if foreign := _foreign(path, _UNBORN):
            raise RunError(f"{path} is not empty and holds no run ({foreign} is in it): choose another folder")
    elif overwrite:
        if foreign := _foreign(path, _OURS):
            raise RunError(f"{path} also holds {foreign}, which no build put there: move it away, then --overwrite")
    elif GradientStore.open(path, partial=True).complete:
        raise RunError(f"{path} holds a finished run already: --overwrite replaces it")


def remove_run(path: Path) -> None:
    """Delete a run; :func:`refuse_finished` has made sure that it is one and nothing else."""
    for name in (_CONFIG, _MANIFEST):  # first, so that what a kill leaves is never taken for a run
        (path / name).unlink(missing_ok=True)
    for each in path.iterdir() if path.exists() else ():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def is_begun(path: Path) -> bool:
    """Whether there is a run to continue."""
    return (path / _MANIFEST).exists()


def require_same_options(path: Path, config: IndexConfig) -> None:
    """Raise :class:`RunError` naming the first option that a run was not begun with."""
    saved, now = _flat(_config_of(path)), _flat(config.to_dict())
    for name in now:
        if name not in _PROVENANCE and saved.get(name) != now[name]:
            raise RunError(
                f"{path} was begun with {_option(name)} {saved.get(name)!r}, not {now[name]!r}: "
                "continue it with the same, or replace it with --overwrite"
            )


def require_same_inputs(path: Path, config: IndexConfig, *, weights: str, tokens: str) -> None:
    """Raise :class:`RunError` where the model's weights or the tokens are not those a run was begun with."""
    plan = GradientStore.open(path, partial=True).plan
    saved, now = _flat(_config_of(path)), _flat(config.to_dict())
    moved = [
        f"{_option(name)} was {saved[name]!r}"
        for name in now
        if name in _PROVENANCE and saved.get(name, now[name]) != now[name]
    ]
    hint = f" ({', '.join(moved)})" if moved else ""
    for what, before, found in (("weights", plan["capture"]["model"], weights), ("tokens", plan["tokens"], tokens)):
        if before != found:
            raise RunError(
                f"{path} was begun with other {what}{hint}: continue it with the same "
                f"{'model' if what == 'weights' else 'dataset and tokenizer'}, or replace it with --overwrite"
            )


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A folder ``RUN.tokens`` for one build at a time, gone afterwards; a killed one's is taken over.

    The first of several processes makes it and removes it when all have left.

    Raises:
        RunError: another process is building the run, or the folder is not such a one.
    """
    import fcntl

    folder = path.with_name(path.name + ".tokens")
    if not current().first:
        yield folder
        current().barrier()
        return
    if folder.exists() and (foreign := _foreign(folder, _TOKENS)):
        raise RunError(f"{folder}, where a build of {path} keeps its tokens, holds {foreign}: choose another folder")
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is building {path}: wait for it, or choose another folder") from None
        try:
            yield folder
            current().barrier()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:
                with suppress(OSError):  # not empty: the run is in it
                    os.rmdir(parent)


def _is_run(path: Path) -> bool:
    with suppress(OSError), (path / _MANIFEST).open("rb") as stream:
        return b'"gradstore"' in stream.read(1000)
    return False


def _foreign(folder: Path, known: set[str]) -> str:
    if not folder.is_dir():
        return folder.name
    names = (each.name for each in sorted(folder.iterdir()) if each.suffix != ".tmp")
    return next((name for name in names if name not in known), "")


def _config_of(path: Path) -> Mapping[str, Any]:
    meta = GradientStore.open(path, partial=True).meta
    if not isinstance(meta, dict) or "config" not in meta:
        raise RunError(f"{path} holds a gradient store that no build made: choose another folder")
    return meta["config"]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in config.items() if name != "data"}, **config["data"]}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
