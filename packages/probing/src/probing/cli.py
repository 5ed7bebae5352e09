"""``trace probe``: circuit, subnetwork, linear, evaluate. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from probing._errors import ProbingError
from probing._from_options import (
    configs,
    continuation,
    keep,
    prepare,
    prepare_many,
    resid_of,
    rounded,
    show,
    show_table,
    train,
    train_together,
)


class _Group(click.Group):
    """Errors meant for people become messages and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ProbingError, OSError) as error:
            raise click.ClickException(str(error)) from None


@click.group("probe", cls=_Group)
def probe() -> None:
    """Find which subnetwork of a model computes a variable."""


_LABEL = click.option("--label", required=True, metavar="COLUMN", help="Column with the variable's value.")
_READOUT = click.option("--readout", required=True, metavar="KEY", help="attn_update_3, mlp_stream_5, resid_mid_0, …")
_LABELS = click.option(
    "--label",
    "labels",
    required=True,
    multiple=True,
    metavar="COLUMN",
    help="Column with the variable's value; several are trained together.",
)
_READOUTS = click.option(
    "--readout",
    "readouts",
    required=True,
    multiple=True,
    metavar="KEY",
    help="attn_update_3, mlp_stream_5, resid_mid_0, …; several are trained together.",
)


def _task_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.argument("model"),
            click.argument("data", type=click.Path(exists=True, dir_okay=False)),
            click.option("--text", default="text", show_default=True, metavar="COLUMN", help="Column with the text."),
            click.option(
                "--position",
                default="last",
                show_default=True,
                help="Token probed: last, first, an index, or word:COLUMN, the word that column names.",
            ),
            click.option("--test", type=click.Path(exists=True, dir_okay=False), help="Rows to score on."),
            click.option("--test-share", default=0.25, show_default=True, help="Without --test, the share held out."),
            click.option("--seed", default=0, show_default=True, help="Of the split, the order and the masks."),
            click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        )
    ):
        command = option(command)
    return command


def _mask_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option(
                "--sites", multiple=True, metavar="PATTERN", help="Modules to mask; by default the sub-block."
            ),
            click.option("--unit", default="neuron", show_default=True, help="weight, neuron, input, head or module."),
            click.option("--method", default="continuous_sparsification", show_default=True, help="Mask rule."),
            click.option("--l0-lambda", default=1e-6, show_default=True, help="Weight of the sparsity penalty."),
            click.option("--target-sparsity", type=float, help="Prune this share instead of weighing a penalty."),
            click.option("--epochs", default=90, show_default=True, help="Passes over the training part."),
            click.option("--batch-size", default=500, show_default=True, help="Rows a step."),
            click.option("--lr", default=1e-3, show_default=True, help="Learning rate of the masks."),
            click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for masks and report."),
        )
    ):
        command = option(command)
    return command


@probe.command("circuit")
@_task_options
@_LABELS
@_READOUTS
@_mask_options
@click.option(
    "--loss",
    type=click.Choice(["contrastive", "linear"]),
    default="contrastive",
    show_default=True,
    help="What makes readouts of one label alike: their distances, or a linear readout.",
)
def circuit(model: str, data: str, labels: tuple[str, ...], readouts: tuple[str, ...], **options: Any) -> None:
    """Train circuit probes: masks under which a readout clusters by the variable.

    Several labels or readouts are trained in one pass, a probe for each pair, which takes less time than one after
    another. Each probe then has a folder of its own below --out.

    \b
    trace probe circuit MODEL rows.jsonl --label number --readout attn_update_0 --out runs/number
    trace probe circuit MODEL rows.jsonl --label number --readout attn_update_0 --readout attn_update_1 --out runs/all
    """
    from probing import CircuitProbe, CircuitProbeConfig, evaluate

    pairs = [(label, readout) for label in labels for readout in readouts]
    several = len(pairs) > 1
    for option, given in (("--label", labels), ("--readout", readouts)):
        if len(set(given)) < len(given):
            raise click.UsageError(f"{option} names the same twice: {', '.join(given)}")
    if several and (options["target_sparsity"] is not None or options["loss"] == "linear"):
        raise click.UsageError("--target-sparsity and --loss linear are for one --label and --readout at a time")
    if len(labels) > 1 and (odd := [each for each in labels if "/" in each or each in ("", ".", "..")]):
        raise click.UsageError(
            f"--label {odd[0]!r} cannot name a folder below --out: rename the column, or probe it alone"
        )
    network, _, tasks = prepare_many(model, data, labels, options)
    tasks = [task for task in tasks for _ in readouts]
    probes = []
    for _, readout in pairs:
        circuit_config, resid_config = configs(network, {**options, "readout": readout})
        probes.append(CircuitProbe(CircuitProbeConfig(readout, circuit_config, resid_config, options["loss"]), network))
    if several:
        traces = train_together(probes, [task.train for task in tasks], options)
    else:
        traces = [train(probes[0], tasks[0].train, options)]
    results = {}
    for (label, readout), trained, task, trace in zip(pairs, probes, tasks, traces):
        knn = evaluate.evaluate_knn(trained, task.train, task.test)
        masks = trained.circuit.masks(readout=readout, knn=knn.circuit.mean, knn_full=knn.full.mean)
        name = "/".join([label] * (len(labels) > 1) + [readout] * (len(readouts) > 1))
        results[name] = {
            "readout": readout, "classes": task.names, "rows": [len(task.train), len(task.test)],
            "knn circuit": str(knn.circuit), "knn full model": str(knn.full), "chance": round(knn.chance, 4),
            "units kept": f"{masks.size} of {masks.total}", "seconds": round(trace.seconds / len(pairs), 2),
        }  # fmt: skip
        reading = (
            "The variable is computed here if the circuit's accuracy is well above the full model's and chance; an "
            "empty circuit at chance says it is not. Whether the model needs it is for trace probe evaluate."
        )
        title = f"Circuit probe: {name}" if several else "Circuit probe"
        keep(Path(options["out"]) / name, title, reading, results[name], masks, trace)
    told = "masks, result and report are in" + (" a folder a probe below" if several else "")
    click.echo(f"{told} {options['out']}", err=True)
    if not several:
        show(next(iter(results.values())), options["as_json"])
    elif options["as_json"]:
        show(results, as_json=True)
    else:
        show_table(results, ("knn circuit", "knn full model", "chance", "units kept", "seconds"))


@probe.command("subnetwork")
@_task_options
@_LABEL
@_READOUT
@_mask_options
@click.option("--hidden", type=int, help="Width of an MLP probe; linear without.")
def subnetwork(model: str, data: str, **options: Any) -> None:
    """Train masks and a classifier together (Cao et al. 2021).

    \b
    trace probe subnetwork MODEL rows.jsonl --label pos --readout mlp_stream_3 --out runs/pos
    """
    import torch

    from probing import SubnetworkProbe, SubnetworkProbeConfig, evaluate

    network, _, task = prepare(model, data, options)
    circuit_config, resid_config = configs(network, options)
    config = SubnetworkProbeConfig(
        options["readout"], len(task.names), circuit_config, resid_config, options["hidden"] or -1, "sequence"
    )
    trained = SubnetworkProbe(config, network)
    trace = train(trained, task.train, options)
    with torch.no_grad():
        logits = trained.probe(evaluate.probed_vectors(trained, task.test).float())
    accuracy = evaluate.Estimate.over_examples((logits.argmax(-1) == task.test.labels).float())
    masks = trained.circuit.masks(readout=options["readout"], accuracy=accuracy.mean)
    chance = float(task.test.labels.bincount().max() / len(task.test.labels))
    result = {
        "readout": options["readout"], "classes": task.names, "rows": [len(task.train), len(task.test)],
        "accuracy": str(accuracy), "chance": round(chance, 4), "units kept": f"{masks.size} of {masks.total}",
        "seconds": round(trace.seconds, 2),
    }  # fmt: skip
    reading = "Accuracy on held-out rows of the classifier on top of the masked model, and what the mask keeps."
    keep(Path(options["out"]), "Subnetwork probe", reading, result, masks, trace)
    click.echo(f"masks, result and report are in {options['out']}", err=True)
    show(result, options["as_json"])


@probe.command("linear")
@_task_options
@_LABEL
@_READOUT
@click.option("--hidden", type=int, help="Width of an MLP probe; linear without.")
@click.option("--epochs", default=100, show_default=True, help="Passes over the training part.")
def linear(model: str, data: str, **options: Any) -> None:
    """Train an ordinary probe on a readout, beside a control task and LEACE erasure.

    \b
    trace probe linear MODEL rows.jsonl --label number --readout resid_mid_2
    """
    from probing import CircuitConfig, CircuitProbe, CircuitProbeConfig, beside, evaluate

    network, _, task = prepare(model, data, options)
    reader = CircuitProbe(
        CircuitProbeConfig(options["readout"], CircuitConfig(), resid_of(options["readout"])), network
    )
    train, test = (evaluate.probed_vectors(reader, part) for part in (task.train, task.test))
    how = {"hidden": options["hidden"], "epochs": options["epochs"]}
    keys = [part.inputs["input_ids"][part.token_mask] for part in (task.train, task.test)]
    real, control, selectivity = beside.selectivity(
        (train, task.train.labels, keys[0]), (test, task.test.labels, keys[1]), seed=options["seed"], **how
    )
    eraser = beside.Eraser.fit(train, task.train.labels)
    erased = beside.train_vector_probe(
        eraser(train), task.train.labels, classes=len(task.names), epochs=options["epochs"]
    )
    chance = float(task.test.labels.bincount().max() / len(task.test.labels))
    result = {
        "readout": options["readout"], "classes": task.names, "rows": [len(task.train), len(task.test)],
        "accuracy": str(real), "control task (by token)": str(control), "selectivity": round(selectivity, 4),
        "linear probe after LEACE": str(erased.accuracy(eraser(test), task.test.labels)), "chance": round(chance, 4),
    }  # fmt: skip
    show(result, options["as_json"])


@probe.command("evaluate")
@_task_options
@_LABEL
@click.option("--masks", "masks_path", required=True, type=click.Path(), help="masks.safetensors of a probe.")
@click.option("--answers", required=True, help="One word a class, in the order of their labels: ' is, are'.")
@click.option("--how", default="zero", show_default=True, help="zero, mean, resample or random.")
@click.option("--space", default="activation", show_default=True, help="activation or weight.")
@click.option("--controls", default=20, show_default=True, help="Random circuits of the same size.")
@click.option(
    "--pool", default="complement", show_default=True, help="Draw them from the complement, or from all units."
)
def evaluate_(model: str, data: str, masks_path: str, answers: str, **options: Any) -> None:
    """Ablate a circuit: does the model's answer need it, more than random units of the same number?

    The measure is the share of rows where the answer of the row's class is the likeliest of all answers.

    \b
    trace probe evaluate MODEL rows.jsonl --label number --masks runs/number/masks.safetensors --answers " are, is"
    """
    from probing import Masks, evaluate
    from probing._task import choice_measure

    network, tokenizer, task = prepare(model, data, options)
    words = answers.split(",")
    if len(words) != len(task.names):
        raise click.UsageError(f"--answers names {len(words)} words, but the labels are {', '.join(task.names)}")
    circuit_masks = Masks.load(masks_path)
    tokens = [continuation(tokenizer, word) for word in words]
    measure = choice_measure(task.test, tokens)
    how: dict[str, Any] = {"how": options["how"], "space": options["space"]}
    if options["how"] in ("mean", "random"):
        how["reference"] = dict(task.train.inputs)
    effect = evaluate.ablation(
        network, circuit_masks, measure, controls=options["controls"], pool=options["pool"], seed=options["seed"], **how
    )
    result = {
        "answers": dict(zip(task.names, words)), "rows": len(task.test), "whole model": str(effect.full),
        "without the circuit": str(effect.ablated), "drop": round(effect.drop, 4),
        "drop of random circuits": effect.undefined or rounded(effect.control_drop),
        "owed to the circuit": rounded(effect.necessity),
        "p": rounded(effect.p_value),
        "units": f"{circuit_masks.size} of {circuit_masks.total}",
    }  # fmt: skip
    show(result, options["as_json"])
