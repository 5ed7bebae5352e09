"""``trace demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from attribute.demo.run import DemoResult


@click.command("demo")
@click.argument("run_path", type=click.Path(), default="runs/demo")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(run_path: str, as_json: bool) -> None:
    """See it work, in about a minute and without a network.

    A small GPT-NeoX is trained on texts about invented people (once; it is kept). Their gradients are collected into
    RUN_PATH, and the index is asked which texts taught the model what it says. Since we planted those texts, we know
    whether they were found.
    """
    from attribute.demo.run import run_demo
    from trace_cli._progress import Bars

    result = run_demo(run_path, progress=Bars())
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps({"quality": [asdict(each) for each in result.quality], "page": str(result.page)}))
        return
    _print(result, run_path)


def _print(result: DemoResult, run_path: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    query = result.report.queries[0]
    console.print(f"\nThe model says: [dim]{escape(query.prompt)}[/dim][bold]{escape(query.completion)}[/bold]")
    for ranking in query.rankings[:2]:
        table = Table(box=None, pad_edge=False, title=_heading(ranking.title), title_justify="left", title_style="")
        table.add_column(ranking.unit, justify="right")
        table.add_column("")
        table.add_column("training text", overflow="fold")
        for entry in ranking.entries:
            mark = "[green]planted[/green]" if entry.planted else f"[yellow]{escape(entry.note)}[/yellow]"
            table.add_row(f"{entry.score:.3f}", mark, escape(entry.text))
        console.print(table)
        console.print()

    figures = Table(box=None, pad_edge=False, title_justify="left", title_style="")
    figures.title = f"Were the planted texts found? Means over {result.quality[0].queries} queries (95 % interval)"
    figures.add_column("method")
    figures.add_column("MRR", justify="right")
    for recall in result.quality[0].recall:
        figures.add_column(f"recall@{recall.k}", justify="right")
    for each in result.quality:
        cells = [each.mrr, *(recall.share for recall in each.recall)]
        figures.add_row(each.method, *(f"{cell.mean:.2f} [dim]{cell.low:.2f}–{cell.high:.2f}[/dim]" for cell in cells))
    console.print(figures)
    console.print(f"\nThe whole of it as a page:  {result.page}")
    console.print(f'Ask it yourself:            trace query --index {run_path} --text "…"')


def _heading(title: str) -> str:
    if title == "Proponents":
        return "Texts whose gradients say they taught it (grad-cos)"
    return f"Texts that {title} finds, which counts shared words"
