"""``trace hessian``."""

from __future__ import annotations

from typing import Any

import click

from trace_cli._options import capture_options, data_options, model_options
from trace_cli._processes import in_processes
from trace_cli._refused import refused_options


@click.command("hessian")
@click.argument("run_path", type=click.Path(file_okay=True))
@refused_options("hessian")
@model_options
@data_options
@capture_options
@click.option(
    "--method",
    type=click.Choice(["kfac", "ekfac", "tkfac", "shampoo"]),
    default="ekfac",
    show_default=True,
    help="How the Fisher of a module is factored.",
)
@click.option("--ev-correction", is_flag=True, help="Measure the eigenvalues by a second pass: kfac becomes ekfac.")
@click.option("--use-dataset-labels", is_flag=True, help="Empirical Fisher: the dataset's labels instead of sampled.")
@click.option("--seed", default=0, show_default=True, help="Of the sampled labels.")
@click.option("--stats-sample-size", default=0, help="So many rows at most, evenly spaced; 0 takes all.")
@click.option("--module-partitions", default=1, show_default=True, help="Fit in so many groups when memory is short.")
@click.option("--overwrite", is_flag=True, help="Replace a curvature that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the spectra as JSON.")
@in_processes
def command(
    run_path: str,
    method: str,
    ev_correction: bool,
    use_dataset_labels: bool,
    seed: int,
    stats_sample_size: int,
    module_partitions: int,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fit the Fisher information of every module as a Kronecker product into RUN_PATH.

    With --projection-dim the factors are those of the sketched sides (sketched EK-FAC), small whatever the model.

    \b
    trace hessian runs/my-hessian --model EleutherAI/pythia-14m --dataset NeelNanda/pile-10k --truncation --method kfac
    """
    corrected = {"kfac": "ekfac", "ekfac": "ekfac", "shampoo": "ev-shampoo"}
    if ev_correction and method not in corrected:
        raise click.UsageError(f"--ev-correction corrects kfac and shampoo, not {method}")
    from attribute.curvature import fit_hessian
    from trace_cli._config import index_config
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config
    from trace_cli._tables import print_spectra

    progress = Bars()
    found = fit_hessian(
        run_path,
        index_config(options, progress),
        corrected[method] if ev_correction else method,
        labels="dataset" if use_dataset_labels else "sampled",
        seed=seed,
        sample=stats_sample_size,
        partitions=module_partitions,
        overwrite=overwrite,
        progress=progress,
    )
    save_config(run_path, "hessian")
    print_spectra(run_path, found.rows, found.spectrum(), as_json=as_json)
