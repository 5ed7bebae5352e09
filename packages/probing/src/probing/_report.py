"""The page a probe leaves behind: figures, a table, and how to read them; one HTML file without outside links."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1b2631; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 500; color: #566573; } figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; }
</style></head><body><h1>$title</h1><p>$reading</p><table>$rows</table>$figures</body></html>
""")


def write_report(
    path: Path, title: str, reading: str, values: Mapping[str, Any], figures: Mapping[str, Figure]
) -> None:
    """Write the page."""
    rows = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in values.items())
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
