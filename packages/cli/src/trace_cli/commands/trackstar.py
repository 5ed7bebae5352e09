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
    normalizer_options,
    stats_option,
)
from trace_cli._processes import in_processes
from trace_cli._refused import refused_options


@click.command("trackstar")
@click.argument("run_path", type=click.Path(file_okay=True))
@refused_options
@model_options
@grouped_data_options("data", "Training data")
@grouped_data_options("query", "Queries")
@capture_options
@loss_options
@normalizer_options
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

    Gradients of both sides, their mixed curvature and the scores, with one pass of the model over either dataset.

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
