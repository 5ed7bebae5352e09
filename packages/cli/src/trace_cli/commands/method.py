"""``trace method``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from trace_cli._options import capture_options, grouped_data_options, model_options
from trace_cli._refused import refused_options

_OWN = (
    "damping",
    "seed",
    "solver_rows",
    "solver_steps",
    "optimizer_state",
    "horizon",
    "batch",
    "group_column",
    "nearest",
    "top_k",
)
_SETTINGS = {"use_dataset_labels": "labels", "optimizer_state": "moments"}
_REWARDS = ("reward_column", "advantage_column", "skip_nan_rewards")


@click.command("method")
@click.argument("name")
@click.argument("run_path", type=click.Path(file_okay=True), required=False)
@refused_options("method")
@model_options
@grouped_data_options("data", "Training data")
@grouped_data_options("query", "Queries")
@click.option(
    "--query.group-column",
    "group_column",
    default="",
    help="Queries of one value of this column are a sub-task, which is scored by their mean gradient, for less.",
)
@click.option("--nearest", is_flag=True, help="One column: the score of the nearest sub-task (or query), for less.")
@capture_options
@click.option(
    "--normalizer",
    type=click.Choice(["none", "adafactor", "adam", "shampoo"]),
    help="Scale sketched gradients (trackstar, preconditioned-if) as this optimiser would. Default: adafactor for "
    "trackstar, with the moments of an optimizer.pt in the model's folder if there is one; none for preconditioned-if.",
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
@click.option("--seed", default=0, show_default=True, help="Of sampled labels; sketches have --projection-seed.")
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

    An option that would do nothing for the method is refused.

    \b
    trace method ek-fac runs/scores --model MODEL --data.dataset train.jsonl --query.dataset questions.jsonl
    trace method less runs/nearest --model MODEL --data.dataset train.jsonl --query.dataset questions.jsonl \\
        --checkpoint runs/step-100=1e-4 --checkpoint runs/step-200=5e-5 --query.group-column task --nearest
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
    from attribute.methods import estimator_named, require_used
    from trace_cli._config import normalizer_fields
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config
    from trace_cli._tables import print_hits

    require_used(estimator_named(name), _typed())

    def group(prefix: str) -> DataConfig:
        found = {key: value for key, value in options.items() if key.startswith(f"{prefix}_")}
        return DataConfig(**{key.removeprefix(f"{prefix}_"): options.pop(key) for key in found})

    data, query = group("data"), group("query")
    own = {key: options.pop(key) for key in _OWN}
    own["optimizer_state"] = own["optimizer_state"] or ""
    own["normalize"] = options["normalizer"] != "none"
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


def _typed() -> dict[str, str]:
    """Settings of methods that were typed, or that a saved configuration has otherwise than by default, as options."""
    context = click.get_current_context()
    found = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        value = context.params.get(name)
        by_default = context.get_parameter_source(name) in (None, click.core.ParameterSource.DEFAULT)
        if value in (None, "", ()) or (by_default and value == parameter.get_default(context)):
            continue
        if name == "projection_dim" and value == 0:  # whole gradients, which most methods work from
            continue
        setting = "rewards" if name.removeprefix("data_").removeprefix("query_") in _REWARDS else name
        found.setdefault(_SETTINGS.get(setting, setting), parameter.opts[0])
    from attribute.methods import OPTIONS

    return {name: option for name, option in found.items() if name in OPTIONS}


def _checkpoint(text: str) -> tuple[str, float]:
    model, _, rate = text.rpartition("=")
    try:
        return model, float(rate)
    except ValueError:
        raise click.UsageError(f"--checkpoint is MODEL=RATE, such as runs/step-100=1e-4, not {text!r}") from None


def _list(as_json: bool) -> None:
    from attribute.methods import OPTIONS, estimators

    rows = [
        {
            "name": each.name,
            "needs": each.needs,
            "cost": each.cost,
            "source": each.source,
            "options": [option for name, option in OPTIONS.items() if name in each.uses],
        }
        for each in estimators().values()
    ]
    if as_json:
        import json

        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['name']:18s} {row['cost']:16s} {row['needs']}  ({row['source']})")
