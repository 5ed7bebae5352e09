"""Pictures of circuits. Each function returns a matplotlib Figure and writes nothing; save it as you like.

>>> from probing import plots
>>> plots.kept_by_layer([circuit]).savefig("circuit.svg")  # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from probing._errors import MaskError
from probing._fit import Trace
from probing._masks import Masks, overlap
from probing.evaluate import Curve

__all__ = ["accuracy_by_size", "head_map", "kept_by_layer", "overlap_map", "training"]

_COLOURS = {
    "only first": "#c0392b",
    "only second": "#2471a3",
    "both": "#7d3c98",
    "circuit": "#c0392b",
    "unused": "#d5d8dc",
}


def kept_by_layer(circuits: Sequence[Masks], labels: Sequence[str] | None = None) -> Figure:
    """Horizontal bars, one a site: the share of units in the circuit; for two circuits in either, both and neither.

    Sites that were not masked are not drawn: nothing is known about them.

    Args:
        circuits: one or two, on the same sites.
        labels: their names.

    Raises:
        MaskError: not one or two circuits, or circuits on different sites.
    """
    if len(circuits) not in (1, 2):
        raise MaskError(f"bars compare one or two circuits, not {len(circuits)}; overlap_map takes more")
    if len(circuits) == 1:
        parts = {"circuit": circuits[0], "unused": ~circuits[0]}
    else:
        a, b = circuits
        parts = {"only first": a - b, "both": a & b, "only second": b - a, "unused": ~(a | b)}
    names: dict[str, str] = dict(zip(("only first", "only second"), labels or ())) if len(circuits) == 2 else {}
    names |= {"circuit": labels[0]} if labels and len(circuits) == 1 else {}
    paths = list(circuits[0].sites)
    figure = Figure(figsize=(7, 0.8 + 0.35 * len(paths)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(paths)
    for part, masks in parts.items():
        shares = [float(masks.keep[path].float().mean()) for path in paths]
        axes.barh(range(len(paths)), shares, left=left, color=_COLOURS[part], label=names.get(part, part))
        left = [x + share for x, share in zip(left, shares)]
    axes.set_yticks(range(len(paths)), paths)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share of {circuits[0].sites[paths[0]].unit}s")
    figure.legend(loc="outside upper center", ncols=len(parts), frameon=False)
    return figure


def head_map(circuit: Masks, values: dict[str, Tensor] | None = None) -> Figure:
    """Heat map, layers × heads: which heads are in the circuit, or any value per head.

    Args:
        circuit: masks of unit ``"head"``.
        values: [heads] per site instead of the mask: effects of single heads, say.

    Raises:
        MaskError: masks of another unit, or layers with different numbers of heads.
    """
    heads = {site.units for site in circuit.sites.values()}
    if any(site.unit != "head" for site in circuit.sites.values()) or len(heads) != 1:
        raise MaskError("a head map needs masks of unit 'head', with as many heads in every layer")
    chosen = values or {path: mask.float() for path, mask in circuit.keep.items()}
    rows = [chosen[path].tolist() for path in circuit.sites]
    figure = Figure(figsize=(1.5 + 0.4 * heads.pop(), 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bottom, top = (None, None) if values else (0, 1)
    image = axes.imshow(rows, cmap="viridis", aspect="auto", vmin=bottom, vmax=top)
    axes.set_yticks(range(len(rows)), [_layer(path) for path in circuit.sites])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes)
    return figure


def overlap_map(circuits: Sequence[Masks], labels: Sequence[str]) -> Figure:
    """Heat map of the Jaccard index of every two circuits, with the number in each cell."""
    table = [[overlap(a, b)["jaccard"] for b in circuits] for a in circuits]
    figure = Figure(figsize=(1.5 + 0.8 * len(circuits), 1 + 0.7 * len(circuits)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, cmap="viridis", vmin=0, vmax=1)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    return figure


def accuracy_by_size(curves: dict[str, Curve]) -> Figure:
    """The sparsity–accuracy curve: faithfulness over the share of units kept, a line each."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(
            curve.sizes, curve.faithfulness, marker="o", label=f"{name} (CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f})"
        )
    axes.axhline(1, color="#d5d8dc", zorder=0)
    axes.set_xlabel("share of units kept")
    axes.set_ylabel("faithfulness")
    axes.legend(frameon=False)
    return figure


def training(traces: dict[str, Trace]) -> Figure:
    """Loss by step, a line a probe."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, trace in traces.items():
        axes.plot(trace.loss, label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return figure


def _layer(path: str) -> str:
    numbers = re.findall(r"\.(\d+)\.", f".{path}.")
    return numbers[0] if numbers else path
