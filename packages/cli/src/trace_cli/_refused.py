"""Options of Bergson's commands that would do nothing here: each says why, and what to type instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

REASONS = {
    "attention": "--split-attention-modules takes the matrices whose heads become columns; how they lie the model says",
    "auto-batch-size": "memory does not depend on rows: --token-batch-size bounds a batch",
    "debug": "TRACE_DEBUG=1 shows where an error comes from",
    "distributed": "--nproc-per-node N shares the work among N processes, --nnodes among machines",
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
"""Of every command."""

_QUERIES_DECIDE = "the queries decide it: give it to the trace reduce or trace build that makes them"
_FISHER = "a Fisher matrix is of the model's own predictions, whose log-likelihood is cross-entropy"
_UNSCALED = "factors are of gradients as they are: trace preconditioners --normalizer fits those of scaled ones"
_PAIRS = "several processes share trace build, trace reduce and trace score: --nproc-per-node is theirs"

REASONS_OF: Mapping[str, Mapping[str, str]] = {
    "build": {
        "aggregation": "an index keeps every row: trace reduce --method mean sums a dataset",
        "unit-normalize": "an index keeps gradients as they are: trace query compares directions by itself, and trace "
        "score does with --unit-normalize",
    },
    "hessian": {
        "attribute-tokens": "a curvature sums over all rows, and their tokens: leave it away",
        "label-smoothing": _FISHER,
        "loss-fn": _FISHER,
        "optimizer-state-path": _UNSCALED,
        "processor-path": _UNSCALED,
    },
    "method": {
        "distributed": _PAIRS,
        "attribute-tokens": "a method scores rows: trace score --attribute-tokens gradient scores tokens",
    },
    "preconditioners": {
        "attribute-tokens": "--index takes the rows of an index, also of one of trace build --attribute-tokens",
    },
    "query": {
        "attention": "the index decides it: trace build --split-attention-modules",
        "auto-batch-size": "queries are few: leave it away",
        "device-map-auto": "--device says where the model runs, and auto takes a GPU if there is one",
        "distributed": _PAIRS,
        "faiss": "the command searches exactly: in Python Attributor(index, faiss_cfg=FaissConfig(…)) takes FAISS",
        "filter-modules": "--modules takes globs, or re:REGEX",
        "model-kwargs": "the index says how its model is loaded, --device where it runs",
        "peft-init-kwargs": "the index says which adapter its model has, --model where its folder lies now",
        "stream-shard-size": "an index is read in blocks whatever its shards: leave it away",
        "use-tf32-matmuls": "the index decides the precision: trace build --precision bf16",
    },
    "reduce": {
        "attribute-tokens": "gradients of tokens sum to that of their row, which is what is reduced: leave it away",
    },
    "score": {
        "aggregation": "--score mean takes the mean of the queries, trace reduce that of a dataset",
        "attention": _QUERIES_DECIDE,
        "include-bias": _QUERIES_DECIDE,
        "label-smoothing": _QUERIES_DECIDE,
        "loss-fn": _QUERIES_DECIDE,
        "loss-reduction": _QUERIES_DECIDE,
        "optimizer-state-path": _QUERIES_DECIDE,
        "processor-path": _QUERIES_DECIDE,
        "projection-type": _QUERIES_DECIDE,
        "skip-preconditioners": "nothing is preconditioned without --preconditioner-path",
        "split-attention-modules": _QUERIES_DECIDE,
        "stats-sample-size": "no statistics are fitted here: the queries bring their normaliser",
        "filter-modules": "--modules takes globs, or re:REGEX",
    },
    "trackstar": {
        "max-tokens": "either dataset has its own: --data.max-tokens and --query.max-tokens",
        "attribute-tokens": "TrackStar scores rows: trace score --attribute-tokens gradient scores tokens",
    },
}
"""Of one command, beside or instead of the reasons of every command."""


def refused_options(command: str) -> Callable[[F], F]:
    """Hidden options that only explain themselves; those that the command has are its own."""

    def decorate(function: F) -> F:
        own = {option for parameter in getattr(function, "__click_params__", []) for option in parameter.opts}
        for name, reason in {**REASONS, **REASONS_OF.get(command, {})}.items():
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

    return decorate


def _refusal(reason: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def refuse(context: click.Context, parameter: click.Parameter, value: object) -> None:
        if value is not None:
            raise click.UsageError(f"{parameter.opts[0]} would do nothing: {reason}", context)

    return refuse
