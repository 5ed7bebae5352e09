"""Tables for the terminal; plain lines when piped."""

from __future__ import annotations

from typing import Any

_ROWS_OF_TEXT = 200


def print_hits(
    query: str, proponents: list[dict[str, Any]], opponents: list[dict[str, Any]], *, unit_norm: bool
) -> None:
    """A query and the rows on either side of it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\n[bold]{escape(_short(query))}[/bold]")
    table = Table(box=None, pad_edge=False)
    table.add_column("cosine" if unit_norm else "dot", justify="right")
    table.add_column("row", justify="right", style="dim")
    table.add_column("training text", overflow="fold")
    for name, hits, colour in (("lower its loss", proponents, "green"), ("raise its loss", opponents, "red")):
        table.add_row("", "", f"[dim]{name}[/dim]")
        for hit in hits:
            score = f"{hit['score']:+.3f}" if unit_norm else f"{hit['score']:+.4g}"
            table.add_row(f"[{colour}]{score}[/{colour}]", str(hit["row"]), escape(_short(hit["text"])))
    console.print(table)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _ROWS_OF_TEXT else line[: _ROWS_OF_TEXT - 1] + "…"
