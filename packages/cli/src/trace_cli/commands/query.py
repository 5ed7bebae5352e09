"""``trace query``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from trace_cli._refused import refused_options

if TYPE_CHECKING:
    from attribute import Asker, Attribution, QueryConfig


@click.command("query")
@refused_options("query")
@click.option(
    "--index", required=True, type=click.Path(exists=True, file_okay=False), help="Run folder of trace build."
)
@click.option("--model", default="", help="Where the index's model lies now, if it has moved.")
@click.option(
    "--queries",
    type=click.Path(exists=True),
    help="File of queries, with the index's columns, or prompt and completion, or text.",
)
@click.option("--text", "texts", multiple=True, help="A query; repeatable.")
@click.option("--top-k", default=5, show_default=True, help="Proponents and opponents a query.")
@click.option(
    "--unit-norm/--no-unit-norm", default=True, show_default=True, help="Cosine of gradients, or their dot product."
)
@click.option("--modules", multiple=True, metavar="PATTERN", help="Count only these modules; repeatable.")
@click.option(
    "--rerank",
    default=0,
    metavar="N",
    help="Rank the N best and N worst rows again by whole gradients; reads the index's dataset.",
)
@click.option("--text-field", default="text", show_default=True, help="Column of a row to show.")
@click.option("--device", default="auto", show_default=True, help="Where the query's gradients are computed.")
@click.option("--record", type=click.Path(dir_okay=False), help="Also write the hits to this CSV file.")
@click.option("--json", "as_json", is_flag=True, help="Print the hits as JSON.")
def command(index: str, model: str, queries: str | None, texts: tuple[str, ...], **options: Any) -> None:
    """Ask an index which training rows made the model say a text.

    A positive score means that training on the row lowers the loss of the query (a proponent), a negative one that it
    raises it (an opponent). With neither --queries nor --text it asks for texts until an empty line.

    \b
    trace query --index runs/quickstart --text "The quick brown fox"
    trace query --index runs/quickstart --queries questions.jsonl --json
    """
    if queries and texts:
        raise click.UsageError("--queries and --text exclude each other")
    from attribute import Asker, QueryConfig
    from attribute.query import read_queries
    from trace_cli._progress import Bars

    query = QueryConfig(options["top_k"], options["unit_norm"], options["modules"], options["rerank"])
    source = read_queries(queries) if queries else None
    asker = Asker.open(index, model=model, device=options["device"])
    if source is not None:
        records = [record for batch in source.batches() for record in batch]
        _show(asker.ask_source(source, query, progress=Bars()), records, options)
    elif texts:
        _ask(asker, list(texts), query, options)
    else:
        _converse(asker, query, options)


def _converse(asker: Asker, query: QueryConfig, options: dict[str, Any]) -> None:
    from attribute import DataError

    while True:
        if sys.stdin.isatty():
            text = click.prompt("text", default="", show_default=False, err=True)
        else:
            text = sys.stdin.readline().strip()
        if not text:
            return
        try:
            _ask(asker, [text], query, options)
        except DataError as error:  # the next text may be better
            click.echo(f"error: {error}", err=True)


def _ask(asker: Asker, texts: list[str], query: QueryConfig, options: dict[str, Any]) -> None:
    from attribute import DataConfig
    from trace_cli._progress import Bars

    records = [{"text": text} for text in texts]
    columns = DataConfig(truncation=asker.config.data.truncation)
    _show(asker.ask(records, query, columns, progress=Bars()), records, options)


def _show(found: Attribution, queries: list[dict[str, Any]], options: dict[str, Any]) -> None:
    from attribute.query import answer

    result = answer(found, queries, text_field=options["text_field"])
    if options["record"]:
        _write_csv(options["record"], result)
    if options["as_json"]:
        import json

        click.echo(json.dumps(result, ensure_ascii=False))
        return
    from trace_cli._tables import print_hits

    for each in result["queries"]:
        print_hits(each["text"], each["proponents"], each["opponents"], unit_norm=options["unit_norm"])


def _write_csv(path: str, result: dict[str, Any]) -> None:
    import csv
    from pathlib import Path

    target = Path(path)
    fresh = not target.exists()
    with target.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if fresh:
            writer.writerow(["query", "direction", "result", "result_index", "score"])
        for each in result["queries"]:
            for direction in ("proponents", "opponents"):
                writer.writerows(
                    [each["text"], direction[:-1], hit["text"], hit["row"], hit["score"]] for hit in each[direction]
                )
