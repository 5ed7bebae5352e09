"""The options that commands of ``trace probe`` share. Importing this module does not import torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

# Written out, since the lists themselves are in modules that import torch; a test compares them.
UNITS = ("weight", "neuron", "input", "head", "module", "expert")
METHODS = (
    "continuous_sparsification", "hard_concrete", "straight_through", "gumbel_sigmoid", "top_k", "magnitude_pruning",
    "random",
)  # fmt: skip
HOW = ("zero", "mean", "resample", "random")
SPACES = ("activation", "weight")
POOLS = ("complement", "all")


class _Finite(click.FloatRange):
    """A range of numbers that neither NaN nor infinity belongs to."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse and check."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{found} is no finite number.", param, ctx)
        return found


def positive() -> click.FloatRange:
    """Numbers above 0."""
    return _Finite(0, min_open=True)


def share() -> click.FloatRange:
    """Numbers strictly between 0 and 1."""
    return _Finite(0, 1, min_open=True, max_open=True)


def at_least(number: int) -> click.IntRange:
    """Whole numbers from this one on."""
    return click.IntRange(number)


def _folder(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """Refuse a folder that could not be made, before anything is loaded or trained."""
    if value is None:
        return None
    path = Path(value)
    above = next((each for each in (path, *path.absolute().parents) if each.exists()), None)
    if above is None or not above.is_dir():
        raise click.BadParameter(f"{value} cannot be made: {above} is a file", context, parameter)
    if not os.access(above, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{value} cannot be made: {above} is not writable", context, parameter)
    return path


def out_option(kept: str, *, required: bool = False) -> Callable[[F], F]:
    """``--out``, and what lands there."""
    return click.option(
        "--out", required=required, type=click.Path(file_okay=False), callback=_folder, help=f"Folder for {kept}."
    )


LABEL = click.option("--label", required=True, metavar="COLUMN", help="Column with the variable's value.")
READOUT = click.option("--readout", required=True, metavar="KEY", help="attn_update_3, mlp_stream_5, resid_mid_0, …")
LABELS = click.option(
    "--label",
    "labels",
    required=True,
    multiple=True,
    metavar="COLUMN",
    help="Column with the variable's value; several are trained together.",
)
READOUTS = click.option(
    "--readout",
    "readouts",
    required=True,
    multiple=True,
    metavar="KEY",
    help="attn_update_3, mlp_stream_5, resid_mid_0, …; several are trained together.",
)
HIDDEN = click.option("--hidden", type=at_least(1), help="Width of an MLP probe; linear without.")
_FILE = click.Path(exists=True, dir_okay=False)


def _stack(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def task_options(command: F) -> F:
    """MODEL, DATA, and how rows become a probing task."""
    return _stack(
        command,
        click.argument("model"),
        click.argument("data", type=_FILE),
        click.option("--text", default="text", show_default=True, metavar="COLUMN", help="Column with the text."),
        click.option(
            "--position",
            default="last",
            show_default=True,
            help="Token probed: last, first, an index, or word:COLUMN, where the word that column names first stands.",
        ),
        click.option(
            "--max-length", type=at_least(1), help="Most tokens of a row; by default as many as the model takes."
        ),
        click.option("--cut", is_flag=True, help="Cut longer texts there, instead of refusing them."),
        click.option(
            "--missing",
            type=click.Choice(["error", "skip"]),
            default="error",
            show_default=True,
            help="Rows without a text or a value: refuse them, or leave them out.",
        ),
        click.option("--test", type=_FILE, help="Rows to score on."),
        click.option(
            "--test-share",
            type=share(),
            default=0.25,
            show_default=True,
            help="Without --test, the share held out; a class of two rows or more is in both parts.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Of the split, the order, the masks and the probes.",
        ),
        click.option("--blocks", metavar="PATH", help="List of blocks, where a model has several: encoder.block."),
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16", "fp16", "auto"]),
            default="fp32",
            show_default=True,
            help="Dtype the model runs in; auto is that of its files.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one."
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    )


def mask_options(command: F) -> F:
    """What is masked, and how masks are trained."""
    return _stack(
        command,
        click.option(
            "--sites",
            multiple=True,
            metavar="PATTERN",
            help="Modules to mask; by default those that compute what the readout reads.",
        ),
        click.option(
            "--unit",
            type=click.Choice(UNITS),
            default="neuron",
            show_default=True,
            help="What is kept or removed as one; head is for attentions, expert for mixtures of experts.",
        ),
        click.option(
            "--method",
            type=click.Choice(METHODS),
            default="continuous_sparsification",
            show_default=True,
            help="Mask rule.",
        ),
        click.option(
            "--l0-lambda", type=_Finite(0), default=1e-6, show_default=True, help="Weight of the sparsity penalty."
        ),
        click.option("--target-sparsity", type=share(), help="Prune this share instead of weighing a penalty."),
        click.option(
            "--epochs", type=at_least(1), default=90, show_default=True, help="Passes over the training part."
        ),
        click.option("--batch-size", type=at_least(2), default=500, show_default=True, help="Rows a step."),
        click.option("--lr", type=positive(), default=1e-3, show_default=True, help="Learning rate of the masks."),
        out_option("masks, result, report and, while training, a checkpoint", required=True),
    )
