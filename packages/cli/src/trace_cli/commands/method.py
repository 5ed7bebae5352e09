"""``trace method``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from trace_cli._options import capture_options, grouped_data_options, model_options

_OWN = ("damping", "seed", "solver_rows", "solver_steps", "optimizer_state", "horizon", "batch", "top_k")


@click.command("method")
@click.argument("name")
@click.argument("run_path", type=click.Path(file_okay=True), required=False)
@model_options
@grouped_data_options("data", "Training data")
@grouped_data_options("query", "Queries")
@capture_options
@click.option(
    "--normalizer",
    type=click.Choice(["none", "adafactor", "adam", "shampoo"]),
    default="none",
    show_default=True,
    help="Scale sketched gradients (trackstar, preconditioned-if) as this optimiser would.",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="MODEL=RATE",
    help="A model of the training and the learning rate around it, for tracin, less and trak; repeatable.",
)
@click.option(
    "--optimizer-state-path",
    "optimizer_state",
    type=click.Path(exists=True),
    help="An optimizer.pt, or its folder: moments for adam-cg, less and --normalizer. Without it they are fitted.",
)
@click.option("--horizon", default=0.0, help="Sum of the training's learning rates over its steps, for adam-cg.")
@click.option(
    "--train-batch-size", "batch", default=0, help="Rows a step of the training, for adam-cg without moments."
)
@click.option("--damping", default=0.1, show_default=True, help="Relative to each module's mean eigenvalue.")
@click.option("--use-dataset-labels", is_flag=True, help="Empirical Fisher: the dataset's labels instead of sampled.")
@click.option("--seed", default=0, show_default=True, help="Of sampled labels and sketches.")
@click.option(
    "--solver-rows",
    default=64,
    show_default=True,
    help="Rows of the exact matrix of adam-cg, ek-fac-cg, lissa; 0: all.",
)
@click.option("--solver-steps", default=10, show_default=True, help="Iterations of adam-cg, ek-fac-cg, lissa.")
@click.option("--top-k", default=5, show_default=True, help="Proponents and opponents a query.")
@click.option("--json", "as_json", is_flag=True, help="Print the hits as JSON.")
def command(name: str, run_path: str | None, as_json: bool, checkpoints: tuple[str, ...], **options: Any) -> None:
    """Score training rows for queries by the method NAME into RUN_PATH; `trace method list` lists them.

    \b
    trace method ek-fac runs/scores --model MODEL --data.dataset train.jsonl --query.dataset questions.jsonl
    """
    if name == "list":
        _list(as_json)
        return
    for option in ("model", "data_dataset", "query_dataset"):
        if not options[option]:
            raise click.UsageError(f"--{option.replace('_', '.')} is missing")
    if not run_path:
        raise click.UsageError("the folder for the scores is missing: trace method NAME RUN_PATH …")
    from attribute import DataConfig, IndexConfig
    from attribute.influence import run_method
    from trace_cli._config import normalizer_fields
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config
    from trace_cli._tables import print_hits

    def group(prefix: str) -> DataConfig:
        found = {key: value for key, value in options.items() if key.startswith(f"{prefix}_")}
        return DataConfig(**{key.removeprefix(f"{prefix}_"): options.pop(key) for key in found})

    data, query = group("data"), group("query")
    own = {key: options.pop(key) for key in _OWN}
    own["optimizer_state"] = own["optimizer_state"] or ""
    normalizer_fields(options)
    labels = "dataset" if options.pop("use_dataset_labels") else "sampled"
    found = run_method(
        run_path,
        name,
        replace(IndexConfig(**options), data=data),
        query,
        checkpoints=[_checkpoint(each) for each in checkpoints],
        labels=labels,
        progress=Bars(),
        **own,
    )
    save_config(run_path, "method")
    answer = found.answer()
    if as_json:
        import json

        click.echo(json.dumps({"path": run_path, "method": name, **answer}))
        return
    for each in answer["queries"]:
        print_hits(each["text"], each["proponents"], each["opponents"], unit_norm=False)
    click.echo(f"{found.scores.store.rows:,} rows × {len(answer['queries'])} queries in {run_path}")


def _checkpoint(text: str) -> tuple[str, float]:
    model, _, rate = text.rpartition("=")
    try:
        return model, float(rate)
    except ValueError:
        raise click.UsageError(f"--checkpoint is MODEL=RATE, such as runs/step-100=1e-4, not {text!r}") from None


def _list(as_json: bool) -> None:
    from attribute.methods import estimators

    rows = [
        {"name": each.name, "needs": each.needs, "cost": each.cost, "source": each.source}
        for each in estimators().values()
    ]
    if as_json:
        import json

        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['name']:18s} {row['cost']:16s} {row['needs']}  ({row['source']})")
