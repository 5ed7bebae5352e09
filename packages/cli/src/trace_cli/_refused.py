"""Options of Bergson's commands that would do nothing here: each says why, and what to type instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

REASONS = {
    "auto-batch-size": "memory does not depend on rows: --token-batch-size bounds a batch",
    "debug": "TRACE_DEBUG=1 shows where an error comes from",
    "drop-columns": "an index always keeps the columns of its rows, to show them",
    "filter-modules": "--modules and --exclude take globs, or re:REGEX",
    "force-math-sdp": "the attention kernel changes no gradient beyond rounding",
    "model-kwargs": "--precision, --revision and --device say how a model is loaded",
    "peft-init-kwargs": "--model takes the folder of an adapter",
    "profile": "a profiler wraps the whole program: py-spy record -- trace …",
    "reshape-to-square": "a two-sided sketch keeps inner products whatever the shape of a matrix",
    "skip-index": "trace preconditioners fits statistics without an index",
    "skip-preconditioners": "nothing is preconditioned here: trace preconditioners and trace hessian fit a curvature",
    "stream-shard-size": "datasets are read in a stream always, and --rows-per-shard sizes what is written",
    "use-tf32-matmuls": "TF32 would cost more digits than sketches do: --precision bf16 is the faster choice",
}


def refused_options(function: F) -> F:
    """Hidden options that only explain themselves; those that the command has are its own."""
    own = {option for parameter in getattr(function, "__click_params__", []) for option in parameter.opts}
    for name, reason in REASONS.items():
        if f"--{name}" not in own:
            option = click.option(
                f"--{name}",
                hidden=True,
                is_flag=False,
                flag_value="",
                expose_value=False,
                callback=_refusal(reason),
                help=f"Refused: {reason}.",
            )
            function = option(function)
    return function


def _refusal(reason: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def refuse(context: click.Context, parameter: click.Parameter, value: object) -> None:
        if value is not None:
            raise click.UsageError(f"{parameter.opts[0]} would do nothing: {reason}", context)

    return refuse
