"""``trace score``."""

from __future__ import annotations

import time
from typing import Any

import click

from trace_cli._options import data_options, same_model_options
from trace_cli._processes import in_processes
from trace_cli._refused import refused_options


@click.command("score")
@click.argument("run_path", type=click.Path(file_okay=True))
@refused_options("score")
@same_model_options
@data_options
@click.option("--query-path", required=True, help="Query gradients: a run folder of trace reduce or trace build.")
@click.option(
    "--score",
    type=click.Choice(["individual", "mean", "nearest"]),
    default="individual",
    show_default=True,
    help="A column a query, the mean query, or the largest over the queries.",
)
@click.option("--unit-normalize", is_flag=True, help="Cosines: gradients of both sides of unit length.")
@click.option("--modules", multiple=True, metavar="PATTERN", help="Count only these modules; repeatable.")
@click.option(
    "--preconditioner-path",
    type=click.Path(exists=True, file_okay=False),
    default=None,
    help="Multiply the queries with the inverse of this curvature of trace hessian or trace preconditioners.",
)
@click.option(
    "--inversion",
    type=click.Choice(["damped", "absolute", "tikhonov", "pseudo-inverse", "factored"]),
    default="damped",
    show_default=True,
    help="How it is inverted.",
)
@click.option("--damping", default=0.1, show_default=True, help="Relative to each module's mean eigenvalue.")
@click.option("--query-rank", default=0, help="Keep so many singular directions of each query; 0 keeps all.")
@click.option("--query-batch-size", default=0, help="Queries in memory at a time; as many as fit if 0.")
@click.option(
    "--attribute-tokens",
    type=click.Choice(["gradient", "output"]),
    default=None,
    help="A score a token: of its position's part in the gradient, or of its own loss.",
)
@click.option(
    "--projection-dim", type=int, default=None, help="The queries decide the sketch; refused if it keeps less."
)
@click.option("--token-batch-size", default=2048, show_default=True, help="Padded tokens a batch.")
@click.option("--rows-per-shard", default=0, help="Rows a file; chosen by size if 0.")
@click.option("--top-k", default=5, show_default=True, help="Proponents and opponents a query.")
@click.option(
    "--export", "exports", multiple=True, metavar="FILE", help="Also write all scores: .csv, .jsonl, .parquet."
)
@click.option("--overwrite", is_flag=True, help="Replace a run that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the hits as JSON.")
@in_processes
def command(run_path: str, overwrite: bool, as_json: bool, exports: tuple[str, ...], **options: Any) -> None:
    """Score every row of a dataset against query gradients into RUN_PATH, keeping nothing but the scores.

    The queries decide model, precision, modules, sketch and normaliser. An interrupted run is continued by the same
    command.

    \b
    trace score runs/scores --query-path runs/query --dataset NeelNanda/pile-10k --truncation --score mean
    trace score runs/influence --query-path runs/query --preconditioner-path runs/ekfac --dataset train.jsonl
    """
    from dataclasses import fields

    from attribute import DataConfig, IndexConfig
    from attribute.curvature import Inversion
    from attribute.processes import current
    from attribute.run import refuse_finished
    from attribute.scoring import ScoreConfig, score_dataset
    from trace_cli._progress import Bars
    from trace_cli._replay import save_config
    from trace_cli._tables import print_hits

    if not options["dataset"]:
        raise click.UsageError("--dataset is missing: the rows to score")
    began = time.perf_counter()
    refuse_finished(run_path, overwrite)
    if options["precision"] is None:
        del options["precision"]
    data = DataConfig(**{each.name: options.pop(each.name) for each in fields(DataConfig)})
    score = ScoreConfig(
        options.pop("query_path"),
        options.pop("score"),
        options.pop("unit_normalize"),
        options.pop("modules"),
        options.pop("preconditioner_path") or "",
        Inversion(options.pop("inversion"), options.pop("damping")),
        options.pop("query_rank"),
        options.pop("attribute_tokens") or "",
        options.pop("query_batch_size"),
        options.pop("top_k"),
    )
    found = score_dataset(
        run_path,
        score,
        IndexConfig(**options, data=data),
        overwrite=overwrite,
        progress=Bars(),
        on_begun=lambda: save_config(run_path, "score"),
    )
    for file in exports if current().first else ():
        found.scores.export(file)
    answer = found.answer()
    if as_json:
        import json

        click.echo(json.dumps({"path": run_path, "seconds": time.perf_counter() - began, **answer}))
        return
    for each in answer["queries"]:
        print_hits(each["text"], each["proponents"], each["opponents"], unit_norm=score.unit_normalize)
    unit = "tokens" if score.tokens else "rows"
    click.echo(
        f"{found.scores.store.rows:,} {unit} × {len(answer['queries'])} queries in {run_path} "
        f"({time.perf_counter() - began:.1f} s)"
    )
