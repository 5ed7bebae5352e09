"""``trace trackstar``."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import click

from trace_cli._options import (
    capture_options,
    grouped_data_options,
    loss_options,
    model_options,
    stats_option,
)
from trace_cli._processes import in_processes
from trace_cli._refused import refused_options


@click.command("trackstar")
@click.argument("run_path", type=click.Path(file_okay=True))
@refused_options("trackstar")
@model_options
@grouped_data_options("data", "Training data")
@grouped_data_options("query", "Queries")
@capture_options
@loss_options
@click.option(
    "--normalizer",
    type=click.Choice(["none", "adafactor", "adam", "shampoo"]),
    help="Scale gradients as this optimiser would; its moments are fitted to a sample of the training rows, or taken "
    "from elsewhere. Default: adafactor, with the moments of an optimizer.pt in the model's folder if there is one.",
)
@click.option(
    "--processor-path",
    type=click.Path(exists=True, file_okay=False),
    help="Take the normaliser that trace preconditioners left in this folder.",
)
@click.option(
    "--optimizer-state-path",
    type=click.Path(exists=True),
    help="Take the second moments of an optimizer.pt, or of the checkpoint folder it is in.",
)
@stats_option
@click.option(
    "--target-downweight-components",
    default=0,
    help="Task directions to mark down; 0: the paper's 1,000 of 65,536, in proportion to the floats a row, "
    "and none where there are fewer queries than that.",
)
@click.option("--mix-hessians/--no-mix-hessians", default=True, show_default=True, help="Or the training side alone.")
@click.option("--damping", default=0.1, show_default=True, help="Relative to each module's mean eigenvalue.")
@click.option("--top-k", default=5, show_default=True, help="Proponents and opponents a query.")
@click.option("--overwrite", is_flag=True, help="Replace a run that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the hits as JSON.")
@in_processes
def command(run_path: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Score training rows for queries as TrackStar does, into RUN_PATH.

    Gradients of both sides, divided by the root of Adafactor's second moments, their mixed curvature, and the cosines.
    The model passes once over either dataset, and once over a sample of the training data where the moments are fitted.

    \b
    trace trackstar runs/my-trackstar --model EleutherAI/pythia-14m --projection-dim 16 \\
        --data.dataset NeelNanda/pile-10k --data.truncation --query.dataset NeelNanda/pile-10k --query.truncation
    """
    from attribute import DataConfig, IndexConfig
    from attribute.curvature import trackstar
    from trace_cli._config import normalizer_fields
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config
    from trace_cli._tables import print_hits

    for name in ("model", "data_dataset", "query_dataset"):
        if not options[name]:
            raise click.UsageError(f"--{name.replace('_', '.')} is missing")

    def group(name: str) -> DataConfig:
        found = {key: value for key, value in options.items() if key.startswith(f"{name}_")}
        return DataConfig(**{key.removeprefix(f"{name}_"): options.pop(key) for key in found})

    data, query = group("data"), group("query")
    own = {
        name: options.pop(option)
        for name, option in (
            ("components", "target_downweight_components"),
            ("mix", "mix_hessians"),
            ("damping", "damping"),
            ("top_k", "top_k"),
        )
    }
    own["sample"] = options["stats_sample_size"]
    own["normalize"] = options["normalizer"] != "none"
    if options["optimizer_state_path"] and options["normalizer"] is None:
        options["normalizer"] = "adafactor"
    normalizer_fields(options)
    began = time.perf_counter()
    found = trackstar(
        run_path, replace(IndexConfig(**options), data=data), query, overwrite=overwrite, progress=Bars(), **own
    )
    save_config(run_path, "trackstar")
    answer = found.answer()
    if as_json:
        import json

        click.echo(json.dumps({"path": run_path, "seconds": time.perf_counter() - began, **answer}))
        return
    for each in answer["queries"]:
        print_hits(each["text"], each["proponents"], each["opponents"], unit_norm=True)
    click.echo(f"{found.scores.store.rows:,} rows × {len(answer['queries'])} queries in {run_path}/scores")
