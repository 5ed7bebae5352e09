"""Options that several commands share, named as the configuration fields they fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


data_options = _stack(
    click.option(
        "--dataset",
        default="",
        help="Hub id, save_to_disk folder, folder of files, or a json, jsonl, csv, parquet or txt file.",
    ),
    click.option(
        "--split", default="train", show_default=True, help="Split; train[:100] and train[10%:20%] take a part."
    ),
    click.option("--subset", default="", help="Configuration of a hub dataset."),
    click.option("--prompt-column", default="text", show_default=True, help="Column of the text, or of the prompt."),
    click.option("--completion-column", default="", help="Column of the completion; only its tokens carry loss."),
    click.option(
        "--conversation-column", default="", help="Column of role/content turns; only the assistant's carry loss."
    ),
    click.option("--truncation", is_flag=True, help="Cut documents at the model's context."),
    click.option("--chunk-length", default=0, help="Cut documents into rows of at most this many tokens."),
    click.option("--max-tokens", default=0, help="Stop after the row that reaches this many tokens."),
    click.option("--reward-column", default="", help="Weight losses by reward less the mean of the prompt (Dr. GRPO)."),
    click.option("--advantage-column", default="", help="Weight losses by this column."),
    click.option("--skip-nan-rewards", is_flag=True, help="Leave rows with a NaN reward out instead of refusing them."),
    click.option("--data-args", default="", metavar="A=1,B=X", help="Arguments for the dataset loader."),
    click.option("--streaming", is_flag=True, help="Read rows as they come, instead of downloading the dataset first."),
)


def _precision(default: str | None, also: str = "") -> Callable[[F], F]:
    return click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16", "fp16", "int8", "int4", "auto"]),
        default=default,
        show_default=default is not None,
        help=f"Dtype the model runs in; int8 and int4 quantise its weights (bitsandbytes).{also}",
    )


_names = _stack(
    click.option("--model", default="", help="Model folder or hub id, or the folder of a PEFT adapter."),
    click.option("--revision", default="", help="Branch, tag or commit of a hub model."),
    click.option("--tokenizer", default="", help="Another tokenizer than the model's own."),
)
_device = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …; auto takes a GPU if there is one."
)
model_options = _stack(_names, _precision("fp32"), _device)
same_model_options = _stack(_names, _precision(None, " Default: that of the queries."), _device)
"""Of a command that takes up what another has made."""

capture_options = _stack(
    click.option(
        "--modules",
        multiple=True,
        metavar="PATTERN",
        help="Glob (or re:REGEX) of modules to capture; repeatable. Default: every linear layer; '*' takes all.",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Modules to leave out; repeatable."),
    click.option("--include-bias", is_flag=True, help="Capture biases too."),
    click.option(
        "--split-attention-modules",
        multiple=True,
        metavar="PATTERN",
        help="Attention matrices whose heads become columns of their own, module.head_0 …; repeatable.",
    ),
    click.option(
        "--projection-dim",
        type=int,
        default=None,
        help="Side of the two-sided sketch, its square floats a module; 0 keeps whole gradients.",
    ),
    click.option(
        "--projection-type",
        type=click.Choice(["rademacher", "normal"]),
        default="rademacher",
        show_default=True,
        help="Entries of the sketch.",
    ),
    click.option("--projection-seed", default=0, show_default=True, help="Another seed is another sketch."),
    click.option(
        "--loss-reduction",
        type=click.Choice(["sum", "mean"]),
        default="sum",
        show_default=True,
        help="Over the labelled tokens of a row.",
    ),
    click.option(
        "--token-batch-size", default=2048, show_default=True, help="Padded tokens a batch; a longer row runs alone."
    ),
)


def grouped_data_options(group: str, about: str) -> Callable[[F], F]:
    """The options of :data:`data_options` under dotted names, ``--data.dataset``, for commands with two datasets."""

    def option(name: str, **settings: Any) -> Callable[[F], F]:
        return click.option(f"--{group}.{name}", f"{group}_{name.replace('-', '_')}", **settings)

    return _stack(
        option("dataset", default="", help=f"{about}: hub id, folder or file, as for trace build."),
        option("split", default="train", show_default=True, help=f"{about}: split, such as train[:100]."),
        option("subset", default="", help=f"{about}: configuration of a hub dataset."),
        option("prompt-column", default="text", show_default=True, help=f"{about}: column of the text or prompt."),
        option("completion-column", default="", help=f"{about}: column of the completion."),
        option("conversation-column", default="", help=f"{about}: column of role/content turns."),
        option("truncation", is_flag=True, help=f"{about}: cut documents at the model's context."),
        option("chunk-length", default=0, help=f"{about}: cut documents into rows of at most this many tokens."),
        option("max-tokens", default=0, help=f"{about}: stop after the row that reaches this many tokens."),
        option("reward-column", default="", help=f"{about}: weight losses by reward less the mean of the prompt."),
        option("advantage-column", default="", help=f"{about}: weight losses by this column."),
        option("skip-nan-rewards", is_flag=True, help=f"{about}: leave rows with a NaN reward out."),
        option("data-args", default="", metavar="A=1,B=X", help=f"{about}: arguments for the dataset loader."),
        option("streaming", is_flag=True, help=f"{about}: read rows as they come."),
    )


sketch_options = _stack(
    click.option(
        "--sketch",
        "sketch_kind",
        type=click.Choice(["spectral", "tensor", "two-sided", "dense", "sparse", "global"]),
        default=None,
        help="What is kept of a gradient. Default: spectral, fitted to a sample, which keeps most in as many floats; "
        "two-sided if --projection-dim is given.",
    ),
    click.option(
        "--sketch-floats", default=256, show_default=True, help="Floats a module (of all together, for global)."
    ),
    click.option(
        "--sketch-budget",
        type=click.Choice(["equal", "shape", "energy"]),
        default=None,
        help="Modules keep equally many floats, or share them by their gradients' entries or energy in a sample. "
        "Default: energy for spectral, equal otherwise.",
    ),
)

normalizer_options = _stack(
    click.option(
        "--normalizer",
        type=click.Choice(["none", "adafactor", "adam", "shampoo"]),
        default="none",
        show_default=True,
        help="Scale gradients as this optimiser would; its moments are fitted to the rows, or taken from elsewhere.",
    ),
    click.option(
        "--processor-path",
        type=click.Path(exists=True, file_okay=False),
        default=None,
        help="Take the normaliser that trace preconditioners left in this folder.",
    ),
    click.option(
        "--optimizer-state-path",
        type=click.Path(exists=True),
        default=None,
        help="Take the second moments of an optimizer.pt, or of the checkpoint folder it is in.",
    ),
)

stats_option = click.option(
    "--stats-sample-size",
    default=10_000,
    show_default=True,
    help="Rows that a normaliser or curvature is fitted to, at most; 0 takes all.",
)

loss_options = _stack(
    click.option(
        "--loss-fn",
        type=click.Choice(["ce", "log_odds", "kl"]),
        default="ce",
        show_default=True,
        help="Cross-entropy, log odds of the label, or KL to a reference.",
    ),
    click.option("--label-smoothing", default=0.0, show_default=True, help="Of cross-entropy."),
    click.option(
        "--reference-model", default="", help="What kl compares with; the model without its adapters by default."
    ),
)
