"""``trace reduce``."""

from __future__ import annotations

import time
from typing import Any

import click

from trace_cli._options import (
    capture_options,
    data_options,
    loss_options,
    model_options,
    normalizer_options,
    sketch_options,
    stats_option,
)
from trace_cli._processes import in_processes
from trace_cli._refused import refused_options


@click.command("reduce")
@click.argument("run_path", type=click.Path(file_okay=True))
@refused_options("reduce")
@model_options
@data_options
@capture_options
@sketch_options
@loss_options
@normalizer_options
@stats_option
@click.option(
    "--method",
    "--aggregation",
    "method",
    type=click.Choice(["mean", "sum"]),
    default="mean",
    show_default=True,
    help="Over the rows with a loss.",
)
@click.option("--unit-normalize", is_flag=True, help="Scale every row's gradient to unit length first.")
@click.option("--group-column", default="", help="One query for each value of this column.")
@click.option("--skip-preconditioners", is_flag=True, help="Does no more than say so: score applies curvature.")
@click.option("--overwrite", is_flag=True, help="Replace a run that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@in_processes
def command(run_path: str, overwrite: bool, as_json: bool, skip_preconditioners: bool, **options: Any) -> None:
    """Sum the gradients of a dataset into the query RUN_PATH, for trace score.

    Gradients are whole unless a sketch is asked for. Queries are kept as they are: a curvature is applied by
    trace score --preconditioner-path, which is the same product.

    \b
    trace reduce runs/query --model EleutherAI/pythia-14m --dataset questions.jsonl --method mean --unit-normalize
    trace score runs/scores --query-path runs/query --dataset NeelNanda/pile-10k --truncation
    """
    from attribute.run import refuse_finished
    from attribute.scoring import ReduceConfig, reduce_gradients
    from trace_cli._config import index_config
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config

    began = time.perf_counter()
    progress = Bars()
    refuse_finished(run_path, overwrite)
    reduce = ReduceConfig(*(options.pop(name) for name in ("method", "unit_normalize", "group_column")))
    store = reduce_gradients(
        run_path,
        reduce,
        index_config(options, progress),
        overwrite=overwrite,
        progress=progress,
        on_begun=lambda: save_config(run_path, "reduce"),
    )
    seconds = time.perf_counter() - began
    made = [store.data(row) for row in range(store.rows)]
    if as_json:
        import json

        click.echo(json.dumps({"path": run_path, "width": store.width, "queries": made, "seconds": seconds}))
        return
    for row in made:
        click.echo(row["text"])
    click.echo(f"{store.rows:,} × {store.width:,} floats in {run_path} ({seconds:.1f} s)")
    click.echo(f"score a dataset:  trace score runs/scores --query-path {run_path} --dataset …")
