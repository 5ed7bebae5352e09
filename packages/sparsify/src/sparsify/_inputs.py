"""What every command is given: a model, a dataset, and what of it to leave out. Imports no torch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from sparsify._errors import SparsifyError, SparsifyWarning
from sparsify._options import parse_assignments


@dataclass(frozen=True)
class Artifacts:
    """What to train on; the rest of a command line is `SaeConfig` and `TrainConfig`."""

    split: str = "train"
    """Dataset split."""
    ctx_len: int = 2048
    """Tokens per row."""
    hf_token: str | None = None
    """Hub token; never written anywhere."""
    revision: str | None = None
    """Model revision."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the model: auto is bf16 on a GPU that has it, elsewhere as it was saved."""
    load_in_8bit: bool = False
    """Load the model in 8 bits, by bitsandbytes."""
    max_examples: int | None = None
    """At most this many rows; required for streamed datasets."""
    text_column: str = "text"
    """The dataset's column of text."""
    shuffle_seed: int = 42
    """Seed with which rows are shuffled."""
    data_preprocessing_num_proc: int = 1
    """Processes that tokenize."""
    data_args: str = ""
    """Arguments for load_dataset, as "name=value,name=value"."""
    exclude_special: bool = False
    """Add the tokenizer's special ids (bos, eos, ...) to exclude_tokens."""
    device: str | None = None
    """cpu, cuda:0, mps ...; by default the best there is."""


@dataclass(frozen=True)
class Exclusion:
    """Tokens that are neither trained on nor judged."""

    exclude_tokens: tuple[int, ...] = ()
    """Token ids whose activations are neither judged nor replaced."""
    max_norm_ratio: float | None = None
    """Leave out tokens whose input norm exceeds this multiple of the batch's median (attention sinks); 0 keeps all."""


def exclusion_of(coders: str) -> Exclusion:
    """What the run in a folder of coders, or the run that the folder is part of, left out in training."""
    for folder in (Path(coders), *Path(coders).resolve().parents[:2]):
        if (folder / "config.json").is_file():
            found = json.loads((folder / "config.json").read_text())
            if not isinstance(found, dict) or "sae" not in found:  # somebody else's
                continue
            return Exclusion(tuple(found.get("exclude_tokens", ())), float(found.get("max_norm_ratio", 0)))
    return Exclusion()


def model_and_rows(model: str, dataset: str, artifacts: Artifacts, *, head: bool) -> tuple[Any, Any]:
    """The model and the rows of tokens that a command line names."""
    from sparsify import _load

    device = _load.pick_device(artifacts.device)
    return load_model(model, artifacts, head=head, device=device), load_rows(model, dataset, artifacts)


def load_model(model: str, artifacts: Artifacts, *, head: bool, device: str) -> Any:
    """The model, on a device."""
    from sparsify import _load

    return _load.load_model(
        model,
        head=head,
        revision=artifacts.revision,
        token=artifacts.hf_token,
        eight_bit=artifacts.load_in_8bit,
        device=device,
        precision=artifacts.precision,
    )


def load_rows(model: str, dataset: str, artifacts: Artifacts) -> Any:
    """The rows of tokens."""
    from sparsify import _load

    return _load.load_rows(
        dataset,
        model,
        split=artifacts.split,
        ctx_len=artifacts.ctx_len,
        max_examples=artifacts.max_examples,
        text_column=artifacts.text_column,
        shuffle_seed=artifacts.shuffle_seed,
        num_proc=artifacts.data_preprocessing_num_proc,
        arguments=parse_assignments(artifacts.data_args),
        revision=artifacts.revision,
        token=artifacts.hf_token,
    )


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Errors made on purpose become one line and exit status 1; anything else is a bug and keeps its traceback.

    Warnings become a line each.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", SparsifyWarning)
        show = warnings.showwarning

        def as_line(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, SparsifyWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                show(message, category, *rest)

        warnings.showwarning = as_line
        try:
            yield
        except SparsifyError as error:
            raise click.ClickException(str(error)) from None
