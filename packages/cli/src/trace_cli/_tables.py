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
            # Of an index of tokens: document and place.
            place = f"{hit['document']}:{hit['position']}" if "position" in hit else str(hit["row"])
            table.add_row(f"[{colour}]{score}[/{colour}]", place, escape(_short(hit["text"])))
    console.print(table)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _ROWS_OF_TEXT else line[: _ROWS_OF_TEXT - 1] + "…"


def print_spectra(path: str, rows: int, spectra: dict[str, dict[str, float]], *, as_json: bool) -> None:
    """The spectrum of every block of a curvature."""
    if as_json:
        import json

        import click

        click.echo(json.dumps({"path": path, "rows": rows, "spectrum": spectra}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for name in ("module", "floats", "mean eigenvalue", "condition", "stable rank"):
        table.add_column(name, justify="left" if name == "module" else "right")
    for name, each in spectra.items():
        condition = "singular" if each["condition"] >= 1e300 else f"{each['condition']:.2g}"
        table.add_row(name, f"{each['size']:,}", f"{each['mean']:.3g}", condition, f"{each['stable_rank']:.1f}")
    console.print(table)
    console.print(f"curvature of {rows:,} rows in {path}")
