"""The commands: ``python -m sparsify MODEL [DATASET] ...`` and ``trace sae train|...``.

Importing this module imports no torch: the heavy half of each command is imported when it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import click

from sparsify._config import SaeConfig, TrainConfig
from sparsify._errors import SparsifyError
from sparsify._options import Command, options_from, parse_assignments


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
    load_in_8bit: bool = False
    """Load the model in 8 bits (needs bitsandbytes and CUDA)."""
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


@click.group(help="Train and use sparse autoencoders and transcoders.")
def sae() -> None:
    """The group that `trace` mounts."""


@sae.command("train", cls=Command)
@click.argument("model", default="HuggingFaceTB/SmolLM2-135M")
@click.argument("dataset", default="EleutherAI/SmolLM2-135M-10B")
@options_from(SaeConfig)
@options_from(TrainConfig, skip=("sae",))
@options_from(Artifacts)
@click.option("--resume", is_flag=True, help="Go on with the run in save_dir/run_name.")
@click.option("--json", "as_json", is_flag=True, help="Print the final averages as JSON.")
def train(model: str, dataset: str, resume: bool, as_json: bool, **options: Any) -> None:
    """Train sparse coders on the activations of MODEL over DATASET.

    DATASET is a Hub name, a folder a dataset was saved to, a .txt, .jsonl, .csv or .parquet file, or a .bin memory map
    of 16-bit token ids. Under torchrun every process trains on its own share.
    """
    with errors_as_messages():
        artifacts = Artifacts(**{f.name: options.pop(f.name) for f in fields(Artifacts)})
        coder = SaeConfig(**{f.name: options.pop(f.name) for f in fields(SaeConfig)})
        cfg = TrainConfig(sae=coder, **options)
        arguments = parse_assignments(artifacts.data_args)
        averages, folder = _train(model, dataset, cfg, artifacts, arguments, resume)
    if averages is None:
        return
    if as_json:
        click.echo(json.dumps({"folder": folder, **averages}))
        return
    for name in sorted(averages):
        if name.startswith("fvu/"):
            hook = name.removeprefix("fvu/")
            l0, silent = averages[f"l0/{hook}"], averages[f"silent/{hook}"]
            click.echo(f"{hook}: FVU {averages[name]:.4f}, L0 {l0:.1f}, silent {silent:.1%}")
        elif name in ("ce", "kl"):
            click.echo(f"{name} {averages[name]:.4f}")
    click.echo(folder)


def _train(
    model: str, dataset: str, cfg: TrainConfig, artifacts: Artifacts, arguments: dict[str, Any], resume: bool
) -> tuple[dict[str, float] | None, str]:
    from sparsify import _load, _parallel
    from sparsify._trainer import Trainer

    with _parallel.joined() as local_rank:
        first = _parallel.Processes().first
        device = _load.pick_device(artifacts.device, local_rank)
        if artifacts.exclude_special:
            ids = _load.special_ids(model, artifacts.revision, artifacts.hf_token)
            cfg = replace(cfg, exclude_tokens=(*cfg.exclude_tokens, *ids))
        loaded = _load.load_model(
            model,
            head=cfg.loss_fn != "fvu",
            revision=artifacts.revision,
            token=artifacts.hf_token,
            eight_bit=artifacts.load_in_8bit,
            device=device,
        )
        with _parallel.first_alone():  # the others find the tokenized dataset in the cache
            rows = _load.load_rows(
                dataset,
                model,
                split=artifacts.split,
                ctx_len=artifacts.ctx_len,
                max_examples=artifacts.max_examples,
                text_column=artifacts.text_column,
                shuffle_seed=artifacts.shuffle_seed,
                num_proc=artifacts.data_preprocessing_num_proc,
                arguments=arguments,
                revision=artifacts.revision,
                token=artifacts.hf_token,
            )
        recipe = {"model": model, "dataset": dataset}
        recipe |= {
            f.name: getattr(artifacts, f.name) for f in fields(Artifacts) if f.name not in ("hf_token", "device")
        }
        trainer = Trainer(cfg, rows, loaded, recipe=recipe)
        if resume:
            trainer.load_state()
        trainer.fit()
        return (trainer.averages if first else None), str(trainer.folder)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Errors made on purpose become one line and exit status 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except SparsifyError as error:
        raise click.ClickException(str(error)) from None
