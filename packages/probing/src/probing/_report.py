"""The page a probe leaves behind: figures, a table, and how to read them; one HTML file without outside links."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from probing._estimate import Estimate
from probing._results import as_json, as_text

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1b2631; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 500; color: #566573; } figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; }
</style></head><body><h1>$title</h1><p>$reading</p><table>$rows</table>$figures</body></html>
""")


def keep(folder: Path, title: str, reading: str, result: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    """Write result.json and report.html into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(as_json(result) + "\n", encoding="utf-8")
    write_report(folder / "report.html", title, reading, result, figures)


def write_report(
    path: Path, title: str, reading: str, values: Mapping[str, Any], figures: Mapping[str, Figure]
) -> None:
    """Write the page."""
    cells = ((html.escape(name), html.escape(as_text(value))) for name, value in values.items())
    rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
    pictures = "".join(
        f"<h2>{html.escape(name)}</h2><figure>{_svg(figure)}</figure>" for name, figure in figures.items()
    )
    page = _PAGE.substitute(title=html.escape(title), reading=html.escape(reading), rows=rows, figures=pictures)
    path.write_text(page, encoding="utf-8")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def intervals(values: Mapping[str, Any], *, of: str, beside: Sequence[float] = (), beside_name: str = "") -> Figure:
    """Estimates as points with their intervals, a line each, and chance as a line across.

    Args:
        values: by name; what is no estimate is left out.
        of: what is measured, under the axis.
        beside: more numbers, as a cloud on a line of its own.
        beside_name: what these are.
    """
    drawn = {name: value for name, value in values.items() if isinstance(value, Estimate)}
    figure = Figure(figsize=(7, 1 + 0.4 * (len(drawn) + bool(beside))), layout="constrained")
    axes = figure.subplots()
    for line, value in enumerate(drawn.values()):
        axes.plot([value.low, value.high], [line, line], color="#2471a3", linewidth=2)
        axes.plot(value.mean, line, "o", color="#2471a3")
    if beside:
        axes.plot(beside, [len(drawn)] * len(beside), "o", color="#c0392b", alpha=0.4)
    if "chance" in values:
        axes.axvline(values["chance"], color="#d5d8dc", zorder=0)
    names = [*drawn, *([beside_name] if beside else [])]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(of)
    return figure
