"""Means with their intervals as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attribute._errors import AttributionError


def plot_intervals(path: str | Path, table: Sequence[Mapping[str, Any]], titles: Mapping[str, str], label: str) -> None:
    """A row a method, a panel a column, dots with their intervals.

    Args:
        path: a .png, .pdf or .svg file.
        table: rows with ``method`` and, by column, ``{"mean", "low", "high"}``, as :func:`compare_methods` gives them.
        titles: column → its title.
        label: of the axes.

    Raises:
        AttributionError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise AttributionError("plots need matplotlib: uv pip install 'attribute[plots]'") from None
    figure = Figure(figsize=(4.5 * len(titles), 0.35 * len(table) + 1.2))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)
    places = list(range(len(table), 0, -1))
    for axis, (name, title) in zip(axes[0], titles.items()):
        means = [row[name]["mean"] for row in table]
        # A bootstrap's interval need not hold the mean of a skewed sample.
        below = [max(0.0, row[name]["mean"] - row[name]["low"]) for row in table]
        above = [max(0.0, row[name]["high"] - row[name]["mean"]) for row in table]
        axis.errorbar(means, places, xerr=[below, above], fmt="o", capsize=2, color="#1f4e79")
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_yticks(places, [row["method"] for row in table])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
