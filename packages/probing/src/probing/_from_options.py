"""What the options of ``trace probe`` ask for: tasks, model, configuration, training.

Importing this module does not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


def prepare(model: str, data: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model's source and the task of one label; `load` then loads the model."""
    source, (task,) = prepare_many(model, data, [options["label"]], options)
    return source, task


def prepare_many(model: str, data: str, labels: Sequence[str], options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The model's source, and a task a label: the same rows and positions, other variables.

    Files are read before the model's weights are, so that a mistake in them shows at once.
    """
    from probing._load import find_source
    from probing._table import read_table
    from probing._task import load_tasks

    rows = read_table(data)
    test = read_table(options["test"]) if options["test"] else None
    source = find_source(model, options["blocks"])
    tasks = load_tasks(
        rows,
        source.tokenizer,
        labels=labels,
        reading=_reading(source, options),
        test_rows=test,
        test_share=options["test_share"],
        skip_missing=options["missing"] == "skip",
        seed=options["seed"],
    )
    if tasks[0].left_out:
        total = len(rows) + len(test or [])
        click.echo(f"left out {tasks[0].left_out} of {total} rows, which lack a text or a value", err=True)
    return source, tasks


def _reading(source: Any, options: dict[str, Any]) -> Any:
    from probing._task import Reading

    context, longest = source.context, options["max_length"]
    if longest is not None and context is not None and longest > context:
        raise click.UsageError(f"--max-length {longest} is more than the {context} tokens that the model takes")
    return Reading(options["text"], options["position"], longest or context, context, options["cut"])


def load(source: Any, tasks: Sequence[Any], options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The model, as `Loaded`, and the tasks where it lies."""
    from probing._load import check_positions, load_model

    loaded = load_model(source, precision=options["precision"], device=options["device"])
    for part, places in zip((tasks[0].train, tasks[0].test), tasks[0].places):
        check_positions(loaded.model, part.inputs["attention_mask"].sum(1).tolist(), places)
    return loaded, [task.to(loaded.model.device) for task in tasks]


def resid_of(key: str, blocks: str | None = None) -> Any:
    """The readout's configuration."""
    from probing import Readout, ResidualUpdateModelConfig

    readout = Readout.parse(key)
    part = readout.kind.partition("_")[0]
    return ResidualUpdateModelConfig(
        "auto",
        [readout.layer],
        attn=part == "attn",
        mlp=part == "mlp",
        cross=part == "cross",
        resid=part == "resid",
        heads=part == "head",
        stream=readout.kind.endswith("_stream"),
        blocks=blocks,
    )


def configs(network: Any, key: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """What is masked, and what is read."""
    from probing import CircuitConfig, Readout
    from probing._default_sites import default_sites

    sites = list(options["sites"])
    sites = sites or default_sites(network, Readout.parse(key), options["unit"], options["blocks"])
    config = CircuitConfig(
        options["method"], {"mask_unit": options["unit"]}, sites, l0_lambda=options["l0_lambda"], seed=options["seed"]
    )
    return config, resid_of(key, options["blocks"])


def _plan_of(options: dict[str, Any]) -> Any:
    from probing import TrainPlan

    return TrainPlan(
        epochs=options["epochs"],
        batch_size=options["batch_size"],
        lr=options["lr"],
        seed=options["seed"],
        target_sparsity=options["target_sparsity"],
    )


def train(probe: Any, data: Any, options: dict[str, Any]) -> Any:
    """One probe, with a bar and a checkpoint in --out, from which an interrupted run goes on."""
    from probing import fit

    plan, checkpoint = _plan_of(options), checkpoint_of(options["out"])
    steps = _steps(plan, data)
    if checkpoint.exists():
        click.echo(f"going on from {checkpoint}", err=True)
    with _bar(steps) as bar:
        return fit(
            probe,
            data,
            plan,
            checkpoint=checkpoint,
            checkpoint_every=min(200, max(1, steps // 10)),
            progress=lambda step, steps, loss: bar.update(step - bar.pos),
        )


def train_together(probes: Sequence[Any], data: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """Several probes as one batch, with a bar."""
    from probing import fit_many

    plan = _plan_of(options)
    with _bar(_steps(plan, data[0])) as bar:
        return fit_many(probes, data, plan, progress=lambda step, steps, loss: bar.update(1))


def _steps(plan: Any, data: Any) -> int:
    return plan.epochs * (len(data) // min(plan.batch_size, len(data)))


def _bar(steps: int) -> Any:
    return progress(steps, "training")


def progress(steps: int, label: str) -> Any:
    """A bar on stderr."""
    return click.progressbar(length=steps, label=label, file=sys.stderr)


def checkpoint_of(folder: Path) -> Path:
    """Where an unfinished run is kept."""
    return folder / "checkpoint.pt"


@contextmanager
def resumable(folder: Path, *, several: bool = False) -> Iterator[None]:
    """A run that leaves no checkpoint when it ends, and says on Ctrl-C what is kept of it.

    Args:
        folder: made here, for who cannot write should know before training.
        several: probes trained together, which have no checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(folder)
    try:
        yield
    except KeyboardInterrupt:
        if several:
            told = "probes trained together keep no checkpoint, so the same command starts anew"
        elif checkpoint.exists():
            told = f"the same command goes on from {checkpoint}"
        else:
            told = "no checkpoint was written yet, so the same command starts anew"
        click.echo(f"\n{told}", err=True)
        raise click.Abort from None
    if not several:
        for path in (checkpoint, checkpoint.with_name(checkpoint.name + ".part")):
            path.unlink(missing_ok=True)
