"""An evaluation as a picture: how often latents fire, and what the model loses with each coder grafted in."""

from __future__ import annotations

from pathlib import Path

from sparsify._evaluate import DENSITY_EDGES, Evaluation


def plot_evaluation(result: Evaluation, path: Path | str) -> Path:
    """Write two panels to a .png, .svg or .pdf file.

    >>> plot_evaluation(evaluate(model, coders, rows), "eval.svg")  # doctest: +SKIP

    Left, the density histogram of each coder (dead latents are counted in its label); right, the cross-entropy of the
    clean model, with each coder, and with the hookpoint's mean or zero in its place.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(result.reconstruction)
    figure = Figure(figsize=(11, 1.6 + max(3.0, 0.35 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)  # no window system is touched
    density, loss = figure.subplots(1, 2)
    for name in names:
        r = result.reconstruction[name]
        density.stairs(r.density, DENSITY_EDGES, label=f"{name} ({r.dead:.1%} dead)")
    density.set(xlabel="log10 of the share of tokens at which a latent fires", ylabel="latents")
    density.legend(fontsize="small")
    if result.grafted:
        places = range(len(names))
        for marker, kind, label in (("o", "grafted", "coder"), ("s", "mean", "mean ablation"), ("x", "zero", "zero")):
            loss.plot([getattr(result, kind)[name].ce for name in names], places, marker, label=label)
        loss.axvline(result.clean_ce, color="0.5", linestyle="--", label=f"clean, {result.clean_ce:.3f}")
        loss.set_yticks(list(places), names)
        loss.invert_yaxis()
        loss.set(xlabel="cross-entropy, nats per token")
        loss.legend(fontsize="small")
    else:
        loss.set_axis_off()
        loss.text(0.5, 0.5, "the model has no logits", ha="center")
    path = Path(path)
    figure.savefig(path)
    return path
