"""``trace evaluate``: how good scores are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from trace_cli._options import grouped_data_options, model_options

_SCORES = click.option(
    "--scores",
    "runs",
    multiple=True,
    metavar="[NAME=]RUN",
    help="A run folder of trace score, method or trackstar (its scores/); repeatable.",
)
_METHODS = click.option(
    "--method", "methods", multiple=True, help="Also run this method (trace method list); kept in TRUTH/scores."
)
_MODULES = click.option(
    "--modules", multiple=True, metavar="PATTERN", default=("*",), show_default=True, help="For --method."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


@click.group("evaluate")
def command() -> None:
    """How good scores are: against retrainings, labelled rows, known mislabels, or other seeds."""


@command.command()
@click.argument("truth", type=click.Path(exists=True, file_okay=False))
@_SCORES
@_METHODS
@click.option(
    "--baselines/--no-baselines", default=True, show_default=True, help="BM25, loss, length and random beside."
)
@_MODULES
@click.option("--plot", type=click.Path(dir_okay=False), help="Also draw the table into this file.")
@_JSON
def lds(truth: str, runs: tuple[str, ...], methods: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Linear datamodelling score against the retrainings in TRUTH, with 95 % intervals and the noise ceiling.

    \b
    trace evaluate lds runs/truth --scores runs/ekfac --method grad-dot --plot lds.png
    """
    from attribute.evaluate import compare_methods, plot_intervals
    from trace_cli._progress import Bars

    table, titles = compare_methods(
        truth, named(runs), methods, baselines=options["baselines"], modules=options["modules"], progress=Bars()
    )
    if options["plot"]:
        plot_intervals(options["plot"], table, titles, "linear datamodelling score")
    _show(table, titles, as_json)


@command.command()
@click.argument("labels", type=click.Path(exists=True, dir_okay=False))
@_SCORES
@click.option(
    "--k", "ks", multiple=True, type=int, default=(1, 10), show_default=True, help="Where recall is read off."
)
@_JSON
def recall(labels: str, runs: tuple[str, ...], ks: tuple[int, ...], as_json: bool) -> None:
    """Do the rows in LABELS come first? MRR and recall@k, with 95 % intervals.

    LABELS has a line a query: {"rows": [3, 17]}, in the order of the scores' queries.
    """
    from attribute.evaluate import evaluate_rankings, rank

    wanted = _rows_of(labels)
    table = []
    for name, scores in _scores(runs).items():
        if len(scores) != len(wanted):
            raise click.UsageError(f"{name} has {len(scores)} queries, {labels} has {len(wanted)} lines")
        quality = evaluate_rankings(name, [rank(each) for each in scores], wanted, ks=ks)
        recalls = {f"recall@{each.k}": vars(each.share) for each in quality.recall}
        table.append({"method": name, "MRR": vars(quality.mrr), **recalls})
    _show(table, {name: name for name in ("MRR", *(f"recall@{k}" for k in ks))}, as_json)


@command.command()
@click.argument("labels", type=click.Path(exists=True, dir_okay=False))
@_SCORES
@_JSON
def mislabels(labels: str, runs: tuple[str, ...], as_json: bool) -> None:
    """Are rows with wrong labels suspected? Area under the ROC curve of each column of scores.

    LABELS is one line, {"rows": [3, 17]}: the wrong ones. Scores are self-influence or losses (trace method
    self-influence, trace method loss), a column for all rows.
    """
    from attribute.evaluate import mislabel_auc

    (wrong,) = _rows_of(labels)[:1]
    table = [{"method": name, "AUC": vars(mislabel_auc(scores[0], wrong))} for name, scores in _scores(runs).items()]
    _show(table, {"AUC": "AUC"}, as_json)


@command.command()
@click.argument("one")
@click.argument("other")
@_JSON
def stability(one: str, other: str, as_json: bool) -> None:
    """Do two runs rank rows alike? Mean Spearman over the queries of ONE and OTHER."""
    from attribute.evaluate import score_stability

    first, second = (next(iter(_scores((each,)).values())) for each in (one, other))
    _show([{"method": f"{one} ~ {other}", "ρ": vars(score_stability(first, second))}], {"ρ": "Spearman"}, as_json)


@command.command("leave-out")
@click.argument("truth", type=click.Path(exists=True, file_okay=False))
@click.option("--model", required=True, help="The model that TRUTH was trained from: folder or hub id.")
@click.option("--revision", default="", help="Branch, tag or commit of a hub model.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda …; auto takes a GPU if there is one.")
@_SCORES
@_METHODS
@_MODULES
@click.option("--k", "ks", multiple=True, type=int, default=(8,), show_default=True, help="Rows left out; repeatable.")
@click.option("--queries", default=8, show_default=True, help="How many to ask: a training each, method and k.")
@_JSON
def leave_out(
    truth: str,
    runs: tuple[str, ...],
    methods: tuple[str, ...],
    modules: tuple[str, ...],
    ks: tuple[int, ...],
    queries: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Train again without the K best rows of a query: how much does its loss rise? Random rows beside.

    Trainings are kept in TRUTH, so that methods share them and an interrupted run goes on.

    \b
    trace evaluate leave-out runs/truth --model start/ --method ek-fac --method bm25 --k 4 --k 16
    """
    from attribute.evaluate import collect_scores, leave_k_out
    from attribute.model import load_model
    from trace_cli._progress import Bars

    progress = Bars()
    start = load_model(options["model"], precision="fp32", device=options["device"], revision=options["revision"])
    scores = collect_scores(truth, named(runs), methods, modules, progress)
    found = leave_k_out(truth, start, scores, ks=ks, queries=queries, progress=progress)
    table = [{"method": name, **{str(k): vars(each) for k, each in row.items()}} for name, row in found.items()]
    _show(table, {str(k): f"loss, {k} rows left out" for k in sorted(set(ks))}, as_json)


@command.command("tail-patch")
@click.argument("truth", type=click.Path(exists=True, file_okay=False))
@_SCORES
@_METHODS
@_MODULES
@click.option("--k", default=10, show_default=True, help="Best rows of each query.")
@click.option("--learning-rate", default=1e-3, show_default=True, help="Of the step of SGD.")
@_JSON
def tail_patch_command(
    truth: str,
    runs: tuple[str, ...],
    methods: tuple[str, ...],
    modules: tuple[str, ...],
    k: int,
    learning_rate: float,
    as_json: bool,
) -> None:
    """One training step on each of a query's K best rows: how much does its loss fall?"""
    import tempfile

    from attribute.evaluate import GroundTruth, collect_scores, tail_patch
    from attribute.model import load_model
    from trace_cli._progress import Bars

    progress, known = Bars(), GroundTruth.open(truth)
    scores = collect_scores(truth, named(runs), methods, modules, progress)
    for name, each in scores.items():
        known.require_shape(each, name)
    model = load_model(truth, precision="fp32")
    with tempfile.TemporaryDirectory(prefix="trace-tail-patch-") as scratch:
        rows, queries = (known.tokens(side, Path(scratch, side), model.vocabulary) for side in ("train", "queries"))
        table = [
            {"method": name, "fall": vars(tail_patch(model, rows, queries, each, k=k, learning_rate=learning_rate))}
            for name, each in scores.items()
        ]
    _show(table, {"fall": "fall of the loss"}, as_json)


@command.command()
@click.argument("run_path", type=click.Path(file_okay=False))
@model_options
@grouped_data_options("data", "Training data")
@grouped_data_options("query", "Queries")
@click.option("--epochs", default=3, show_default=True, help="Of each training.")
@click.option("--batch-size", default=16, show_default=True, help="Rows a step.")
@click.option("--learning-rate", default=1e-3, show_default=True, help="Of AdamW, falling to 0.")
@click.option("--weight-decay", default=0.0, show_default=True, help="Of AdamW.")
@click.option(
    "--drop", "drops", multiple=True, type=float, default=(0.5,), show_default=True, help="Share of rows; repeatable."
)
@click.option("--subsets", default=20, show_default=True, help="Retrainings for each share.")
@click.option("--again", is_flag=True, help="Train each subset in another order, too, for the noise ceiling.")
@click.option("--seed", default=0, show_default=True, help="Of order and subsets.")
def make(run_path: str, drops: tuple[float, ...], **options: Any) -> None:
    """Make ground truth into RUN_PATH: train on all rows, then without random shares of them.

    An interrupted run is continued by the same command.

    \b
    trace evaluate make runs/truth --model start/ --data.dataset train.jsonl --query.dataset questions.jsonl
    """
    import tempfile

    from attribute import DataConfig, IndexConfig
    from attribute.attributor import record_text
    from attribute.data import open_source
    from attribute.evaluate import Recipe, make_truth
    from attribute.index import records_of, tokenise
    from attribute.model import load_model, load_tokenizer
    from trace_cli._progress import Bars

    for name in ("model", "data_dataset", "query_dataset"):
        if not options[name]:
            raise click.UsageError(f"--{name.replace('_', '.')} is missing")

    def group(prefix: str) -> DataConfig:
        found = {key: value for key, value in options.items() if key.startswith(f"{prefix}_")}
        return DataConfig(**{key.removeprefix(f"{prefix}_"): options.pop(key) for key in found})

    sides = {"train": group("data"), "queries": group("query")}
    recipe = Recipe(
        **{
            name: options.pop(name)
            for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "seed", "subsets", "again")
        },
        drops=drops,
    )
    config, progress = IndexConfig(**options), Bars()
    tokenizer = load_tokenizer(config.tokenizer or config.model, config.revision)
    model = load_model(config.model, precision="fp32", device=config.device, revision=config.revision)
    with tempfile.TemporaryDirectory(prefix="trace-truth-") as scratch:
        tokens, texts = {}, {}
        for side, data in sides.items():
            folder = Path(scratch) / side
            folder.mkdir()
            source = open_source(data)
            tokens[side] = tokenise(folder, source, tokenizer, replace(config, data=data), model, progress)
            texts[side] = [record_text(record) for record in records_of(folder)]
        truth = make_truth(
            run_path,
            model,
            tokens["train"],
            tokens["queries"],
            (texts["train"], texts["queries"]),
            recipe,
            tokenizer,
            progress,
        )
    for name, bank in truth.banks.items():
        share = f"{100 * bank.dropped:.3g}%"
        click.echo(f"bank {name}: {len(bank.kept)} retrainings, {share} of {truth.rows} rows dropped")
    click.echo(f"judge methods by it:  trace evaluate lds {run_path} --method ek-fac")


def named(runs: tuple[str, ...]) -> dict[str, str]:
    """``NAME=RUN`` and ``RUN`` as name → folder."""
    found = {}
    for each in runs:
        name, _, path = each.rpartition("=")
        found[name or path] = path
    return found


def _scores(runs: tuple[str, ...]) -> dict[str, Any]:
    from attribute.evaluate import scores_of

    if not runs:
        raise click.UsageError("--scores RUN is missing")
    return {name: scores_of(path) for name, path in named(runs).items()}


def _rows_of(path: str) -> list[set[int]]:
    try:
        return [set(json.loads(line)["rows"]) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    except (ValueError, KeyError, TypeError) as error:
        raise click.UsageError(f'{path}: a line is {{"rows": [3, 17]}}, found {error}') from error


def _show(table: list[dict[str, Any]], titles: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(table))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    drawn.add_column("method")
    for title in titles.values():
        drawn.add_column(title, justify="right")
    for row in table:
        cells = [row[name] for name in titles]
        drawn.add_row(
            row["method"], *(f"{c['mean']:.3f} [dim]\\[{c['low']:.3f}, {c['high']:.3f}][/dim]" for c in cells)
        )
    Console(highlight=False).print(drawn)
