"""``trace preconditioners``."""

from __future__ import annotations

from typing import Any

import click

from trace_cli._options import (
    capture_options,
    data_options,
    loss_options,
    model_options,
    normalizer_options,
    stats_option,
)
from trace_cli._processes import in_processes
from trace_cli._refused import refused_options


@click.command("preconditioners")
@click.argument("run_path", type=click.Path(file_okay=True))
@refused_options("preconditioners")
@model_options
@data_options
@capture_options
@loss_options
@normalizer_options
@stats_option
@click.option(
    "--index",
    type=click.Path(exists=True, file_okay=False),
    help="Take the rows of this index of trace build; no model runs.",
)
@click.option("--joint", is_flag=True, help="One matrix over all modules together instead of one a module.")
@click.option("--overwrite", is_flag=True, help="Replace a curvature that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the spectra as JSON.")
@in_processes
def command(
    run_path: str,
    index: str | None,
    joint: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit the second moment of sketched gradients into RUN_PATH, and report its spectrum.

    \b
    trace preconditioners runs/my-processor --model EleutherAI/pythia-14m --dataset NeelNanda/pile-10k --truncation
    trace preconditioners runs/my-processor --index runs/my-index

    With --normalizer the scales of its gradients are kept there too, for --processor-path of the other commands.
    """
    if index and options["normalizer"] != "none":
        raise click.UsageError("the rows of an --index are scaled already, if at all: leave --normalizer away")
    if index and (options["model"] or options["dataset"]):
        raise click.UsageError("--index has its gradients already: leave --model and --dataset away")
    from attribute.curvature import fit_preconditioners
    from trace_cli._config import index_config
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config
    from trace_cli._tables import print_spectra

    progress = Bars()
    config = None if index else index_config(options, progress)
    gram = fit_preconditioners(
        run_path,
        config,
        index=index or "",
        joint=joint,
        sample=options["stats_sample_size"],
        overwrite=overwrite,
        progress=progress,
    )
    save_config(run_path, "preconditioners")
    print_spectra(run_path, gram.rows, gram.spectrum(), as_json=as_json)
