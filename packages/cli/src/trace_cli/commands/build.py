"""``trace build``."""

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


@click.command("build")
@click.argument("run_path", type=click.Path(file_okay=True))
@refused_options("build")
@model_options
@data_options
@capture_options
@loss_options
@normalizer_options
@stats_option
@sketch_options
@click.option(
    "--store-dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4", "int2", "int1"]),
    default="fp32",
    show_default=True,
    help="Encoding of the stored rows; int4 takes an eighth and ranks next to the same.",
)
@click.option("--attribute-tokens", is_flag=True, help="A row a token; those of a document sum to its gradient.")
@click.option("--rows-per-shard", default=0, help="Rows a file; chosen by size if 0.")
@click.option("--overwrite", is_flag=True, help="Replace a run that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@in_processes
def command(run_path: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Collect the gradient of every training row into the index RUN_PATH.

    An interrupted build is continued by the same command. Without --model and --dataset the demo's corpus and model
    are used.

    \b
    trace build runs/quickstart --model EleutherAI/pythia-14m --dataset NeelNanda/pile-10k --truncation
    trace query --index runs/quickstart --text "What made the model say this?"
    """
    from attribute import build_index
    from attribute.run import refuse_finished
    from trace_cli._config import index_config
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config

    began = time.perf_counter()
    progress = Bars()
    refuse_finished(run_path, overwrite)
    config = index_config(options, progress)
    store = build_index(
        run_path, config, overwrite=overwrite, progress=progress, on_begun=lambda: save_config(run_path, "build")
    )
    seconds = time.perf_counter() - began
    if as_json:
        import json

        summary = {
            "path": run_path,
            "rows": store.rows,
            "width": store.width,
            "modules": len(store.columns),
            "seconds": seconds,
        }
        click.echo(json.dumps(summary))
        return
    click.echo(f"{store.rows:,} rows × {store.width:,} floats in {run_path} ({seconds:.1f} s)")
    click.echo(f'ask it:  trace query --index {run_path} --text "…"')
