"""Plots of tables; matplotlib is asked for only where one is wanted."""

from __future__ import annotations

from typing import Any

import click


def plot_intervals(path: str, table: list[dict[str, Any]], titles: dict[str, str], label: str) -> None:
    """A row a method, a panel a column, dots with their intervals."""
    try:
        import matplotlib
    except ImportError:
        raise click.ClickException("--plot needs matplotlib: uv pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(titles), figsize=(4.5 * len(titles), 0.35 * len(table) + 1.2), sharey=True, squeeze=False
    )
    places = range(len(table), 0, -1)
    for axis, (name, title) in zip(axes[0], titles.items()):
        means = [row[name]["mean"] for row in table]
        # A bootstrap's interval need not hold the mean of a skewed sample.
        below = [max(0.0, row[name]["mean"] - row[name]["low"]) for row in table]
        above = [max(0.0, row[name]["high"] - row[name]["mean"]) for row in table]
        axis.errorbar(means, list(places), xerr=[below, above], fmt="o", capsize=2, color="#1f4e79")
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_yticks(list(places), [row["method"] for row in table])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
