"""``trace probe``: circuit, subnetwork, linear, evaluate. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from probing._errors import ProbingError
from probing._from_options import (
    configs,
    load,
    prepare,
    prepare_many,
    progress,
    resid_of,
    resumable,
    train,
    train_together,
)
from probing._options import (
    HIDDEN,
    HOW,
    LABEL,
    LABELS,
    POOLS,
    READOUT,
    READOUTS,
    SPACES,
    at_least,
    mask_options,
    out_option,
    task_options,
)
from probing._results import Kept, Undefined, show, show_table


class _Group(click.Group):
    """Errors meant for people become messages and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader has gone: nothing to explain to
            raise
        except (ProbingError, OSError) as error:
            raise click.ClickException(str(error)) from None


@click.group("probe", cls=_Group)
def probe() -> None:
    """Find which subnetwork of a model computes a variable."""


@probe.command("circuit")
@task_options
@LABELS
@READOUTS
@mask_options
@click.option(
    "--loss",
    type=click.Choice(["contrastive", "linear"]),
    default="contrastive",
    show_default=True,
    help="A circuit's vector is to have neighbours of its label among the circuit's other vectors (contrastive), or "
    "among the full model's (linear).",
)
def circuit(model: str, data: str, labels: tuple[str, ...], readouts: tuple[str, ...], **options: Any) -> None:
    """Train circuit probes: masks under which a readout clusters by the variable.

    Several labels or readouts are trained in one pass, a probe for each pair, which takes less time than one after
    another. Each probe then has a folder of its own below --out. One probe alone keeps a checkpoint there while it is
    trained: after Ctrl-C the same command goes on from it.

    \b
    trace probe circuit MODEL rows.jsonl --label number --readout attn_update_0 --out runs/number
    trace probe circuit MODEL rows.jsonl --label number --readout attn_update_0 --readout attn_update_1 --out runs/all
    """
    from probing import CircuitProbe, CircuitProbeConfig, Readout

    pairs = [(label, readout) for label in labels for readout in readouts]
    several = len(pairs) > 1
    _check_together(labels, readouts, options)
    for readout in readouts:
        Readout.parse(readout)
    source, tasks = prepare_many(model, data, labels, options)
    loaded, tasks = load(source, tasks, options)
    tasks = [task for task in tasks for _ in readouts]
    probes = []
    for _, readout in pairs:
        circuit_config, resid_config = configs(loaded.model, readout, options)
        config = CircuitProbeConfig(readout, circuit_config, resid_config, options["loss"])
        probes.append(CircuitProbe(config, loaded.model))
    with resumable(options["out"], several=several):
        if several:
            traces = train_together(probes, [task.train for task in tasks], options)
        else:
            traces = [train(probes[0], tasks[0].train, options)]
        results = {}
        for (label, readout), trained, task, trace in zip(pairs, probes, tasks, traces):
            name = "/".join([label] * (len(labels) > 1) + [readout] * (len(readouts) > 1))
            results[name] = _circuit_result(
                trained, task, trace, options["out"] / name, name, trace.seconds / len(pairs)
            )
    told = "masks, result and report are in" + (" a folder a probe below" if several else "")
    click.echo(f"{told} {options['out']}", err=True)
    if not several:
        show(next(iter(results.values())), json_wanted=options["as_json"])
    elif options["as_json"]:
        show(results, json_wanted=True)
    else:
        show_table(results, ("knn circuit", "knn full model", "chance", "units kept", "seconds"))


def _check_together(labels: Sequence[str], readouts: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse labels and readouts that cannot be trained in one pass, or kept in folders of their own."""
    for option, given in (("--label", labels), ("--readout", readouts)):
        if len(set(given)) < len(given):
            raise click.UsageError(f"{option} names the same twice: {', '.join(given)}")
    if len(labels) * len(readouts) == 1:
        return
    if options["target_sparsity"] is not None or options["loss"] == "linear":
        raise click.UsageError("--target-sparsity and --loss linear are for one --label and --readout at a time")
    if options["unit"] not in ("neuron", "input", "head"):
        raise click.UsageError(f"--unit {options['unit']} is for one --label and --readout at a time")
    if len(labels) > 1 and (odd := [each for each in labels if "/" in each or each in ("", ".", "..")]):
        raise click.UsageError(
            f"--label {odd[0]!r} cannot name a folder below --out: rename the column, or probe it alone"
        )


def _circuit_result(trained: Any, task: Any, trace: Any, folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """Score one trained probe, and keep masks, result and report."""
    from probing import evaluate

    readout = trained.config.probe_vectors
    knn = evaluate.evaluate_knn(trained, task.train, task.test)
    masks = trained.circuit.masks(readout=readout, knn=knn.circuit.mean, knn_full=knn.full.mean)
    result = {
        "readout": readout, "classes": task.names, "rows": [len(task.train), len(task.test)],
        "knn circuit": knn.circuit, "knn full model": knn.full, "chance": knn.chance,
        "units kept": Kept(masks.size, masks.total), "seconds": round(seconds, 2),
    }  # fmt: skip
    reading = (
        "The variable is computed here if the circuit's accuracy is well above the full model's and chance; an "
        "empty circuit at chance says it is not. Whether the model needs it is for trace probe evaluate."
    )
    _keep_masks(folder, f"Circuit probe: {name}" if name else "Circuit probe", reading, result, masks, trace)
    return result


def _keep_masks(folder: Path, title: str, reading: str, result: dict[str, Any], masks: Any, trace: Any) -> None:
    from probing import plots
    from probing._report import keep

    masks.save(folder / "masks.safetensors")
    figures = {"Units kept": plots.kept_by_layer([masks]), "Training": plots.training({"loss": trace})}
    keep(folder, title, reading, result, figures)


@probe.command("subnetwork")
@task_options
@LABEL
@READOUT
@mask_options
@HIDDEN
def subnetwork(model: str, data: str, **options: Any) -> None:
    """Train masks and a classifier together (Cao et al. 2021).

    After Ctrl-C the same command goes on from the checkpoint in --out.

    \b
    trace probe subnetwork MODEL rows.jsonl --label pos --readout mlp_stream_3 --out runs/pos
    """
    import torch

    from probing import Readout, SubnetworkProbe, SubnetworkProbeConfig, evaluate

    readout, out = options["readout"], options["out"]
    Readout.parse(readout)
    source, task = prepare(model, data, options)
    loaded, (task,) = load(source, [task], options)
    circuit_config, resid_config = configs(loaded.model, readout, options)
    config = SubnetworkProbeConfig(
        readout, len(task.names), circuit_config, resid_config, options["hidden"] or -1, "sequence"
    )
    trained = SubnetworkProbe(config, loaded.model)
    with resumable(out):
        trace = train(trained, task.train, options)
        with torch.no_grad():
            logits = trained.probe(evaluate.probed_vectors(trained, task.test).float())
        accuracy = evaluate.Estimate.over_examples((logits.argmax(-1) == task.test.labels).float())
        masks = trained.circuit.masks(readout=readout, accuracy=accuracy.mean)
        result = {
            "readout": readout, "classes": task.names, "rows": [len(task.train), len(task.test)],
            "accuracy": accuracy, "chance": _chance(task), "units kept": Kept(masks.size, masks.total),
            "seconds": round(trace.seconds, 2),
        }  # fmt: skip
        reading = "Accuracy on held-out rows of the classifier on top of the masked model, and what the mask keeps."
        _keep_masks(out, "Subnetwork probe", reading, result, masks, trace)
    click.echo(f"masks, result and report are in {out}", err=True)
    show(result, json_wanted=options["as_json"])


def _chance(task: Any) -> float:
    """The share of the most frequent class among the rows scored."""
    from probing._data import most_frequent

    return most_frequent(task.test.labels)


@probe.command("linear")
@task_options
@LABEL
@READOUT
@HIDDEN
@click.option("--epochs", type=at_least(1), default=100, show_default=True, help="Passes over the training part.")
@out_option("result and report; none are kept without")
def linear(model: str, data: str, **options: Any) -> None:
    """Train an ordinary probe on a readout, beside a control task and LEACE erasure.

    \b
    trace probe linear MODEL rows.jsonl --label number --readout resid_mid_2
    """
    from probing import CircuitConfig, CircuitProbe, CircuitProbeConfig, beside, evaluate

    readout, seed, epochs = options["readout"], options["seed"], options["epochs"]
    resid = resid_of(readout, options["blocks"])
    source, task = prepare(model, data, options)
    loaded, (task,) = load(source, [task], options)
    reader = CircuitProbe(CircuitProbeConfig(readout, CircuitConfig(), resid), loaded.model)
    parts = (task.train, task.test)
    keys = [part.inputs["input_ids"][part.token_mask] for part in parts]
    with progress(4, "probing") as bar:
        vectors = []
        for part in parts:
            vectors.append(evaluate.probed_vectors(reader, part).float())
            bar.update(1)
        train_rows, test_rows = ((v, part.labels, k) for v, part, k in zip(vectors, parts, keys))
        real, control, selectivity = beside.selectivity(
            train_rows, test_rows, seed=seed, hidden=options["hidden"], epochs=epochs
        )
        bar.update(1)
        eraser = beside.Eraser.fit(vectors[0], task.train.labels)
        erased = beside.train_vector_probe(
            eraser(vectors[0]), task.train.labels, classes=len(task.names), epochs=epochs, seed=seed
        )
        bar.update(1)
    result = {
        "readout": readout, "classes": task.names, "rows": [len(task.train), len(task.test)], "accuracy": real,
        "control task (by token)": _no_control(keys) if control is None else control,
        "selectivity": Undefined() if selectivity is None else selectivity,
        "linear probe after LEACE": erased.accuracy(eraser(vectors[1]), task.test.labels), "chance": _chance(task),
    }  # fmt: skip
    reading = (
        "Accuracy says that the readout holds the variable. Selectivity, accuracy less that on labels drawn at random "
        "for each token, is what the probe has not merely memorised; after LEACE no linear probe should beat chance."
    )
    _keep_scores(options["out"], "Linear probe", reading, result, "Accuracy")
    show(result, json_wanted=options["as_json"])


def _no_control(keys: Sequence[Any]) -> Undefined:
    """Why there is no control task."""
    if all(bool((each == keys[0][0]).all()) for each in keys):
        return Undefined("every row's probed token is the same, so all would have one label")
    return Undefined("the tokens of all training rows drew one label")


def _keep_scores(
    folder: Path | None,
    title: str,
    reading: str,
    result: dict[str, Any],
    of: str,
    beside: Sequence[float] = (),
    beside_name: str = "",
) -> None:
    """Result and report with a figure of accuracies, where a folder is named."""
    if folder is None:
        return
    from probing._report import intervals, keep

    figure = intervals(result, of=of.lower(), beside=beside, beside_name=beside_name)
    keep(folder, title, reading, result, {of: figure})
    click.echo(f"result and report are in {folder}", err=True)


@probe.command("evaluate")
@task_options
@LABEL
@click.option("--masks", "masks_path", required=True, type=click.Path(), help="masks.safetensors of a probe.")
@click.option(
    "--answers",
    required=True,
    help="One word a class, in the order of their labels, ' is, are', or by label: 'sg= is,pl= are'.",
)
@click.option(
    "--how", type=click.Choice(HOW), default="zero", show_default=True, help="What removed units give instead."
)
@click.option(
    "--space", type=click.Choice(SPACES), default="activation", show_default=True, help="What of them is replaced."
)
@click.option("--controls", type=at_least(0), default=20, show_default=True, help="Random circuits of the same size.")
@click.option(
    "--pool",
    type=click.Choice(POOLS),
    default="complement",
    show_default=True,
    help="Draw them from outside the circuit, or from all units.",
)
@click.option("--any-weights", is_flag=True, help="Take masks found in a model of the same shape but other weights.")
@out_option("result and report; none are kept without")
def evaluate_(model: str, data: str, masks_path: str, answers: str, **options: Any) -> None:
    """Ablate a circuit: does the model's answer need it, more than random units of the same number?

    The measure is the share of rows where the answer of the row's class is the likeliest of all answers. It takes a
    model that says a next token, from left to right.

    \b
    trace probe evaluate MODEL rows.jsonl --label number --masks runs/number/masks --answers "pl= are,sg= is"
    """
    from probing import Masks, evaluate
    from probing._answers import check_fit, choice_measure, continuation, parse_answers
    from probing._load import require_next_token

    source, task = prepare(model, data, options)
    words = parse_answers(answers, task.names)
    circuit_masks = Masks.load(masks_path)
    tokens = {word: continuation(source.tokenizer, word) for word in words.values()}
    check_fit(task.test, task.places[1], tokens, source.context)
    loaded, (task,) = load(source, [task], options)
    require_next_token(loaded, model)
    _check_masks(circuit_masks, loaded.model, options["any_weights"])
    how: dict[str, Any] = {name: options[name] for name in ("how", "space", "controls", "pool", "seed")}
    if options["how"] in ("mean", "random"):
        how["reference"] = dict(task.train.inputs)
    with progress(2 + options["controls"] * bool(circuit_masks.size), "ablating") as bar:
        measure = choice_measure(task.test, list(tokens.values()), seen=lambda: bar.update(1))
        effect = evaluate.ablation(loaded.model, circuit_masks, measure, same_weights=not options["any_weights"], **how)
    result = {
        "answers": words, "rows": len(task.test), "whole model": effect.full, "without the circuit": effect.ablated,
        "drop": effect.drop, **_beside_controls(effect, options["controls"], options["pool"], circuit_masks.size),
        "units": Kept(circuit_masks.size, circuit_masks.total),
    }  # fmt: skip
    reading = (
        "The model needs the circuit if its answers suffer more without it than without as many random units: p is the "
        "share of the draws, this circuit among them, that cost at least as much."
    )
    scores = ("Right answers", effect.controls, "without random units")
    _keep_scores(options["out"], "Ablation of a circuit", reading, result, *scores)
    show(result, json_wanted=options["as_json"])


def _check_masks(masks: Any, network: Any, any_weights: bool) -> None:
    from probing import MaskError

    try:
        masks.check(network, same_weights=not any_weights)
    except MaskError as error:
        raise MaskError(str(error).replace("pass same_weights=False", "type --any-weights")) from None


def _beside_controls(effect: Any, controls: int, pool: str, kept: int) -> dict[str, Any]:
    """The figures that rest on random circuits, or why there are none."""
    names = ("drop of random circuits", "owed to the circuit", "p")
    if effect.control_drop is not None:
        return dict(zip(names, (effect.control_drop, effect.necessity, effect.p_value)))
    why = effect.undefined if controls else "--controls 0 asks for no random circuits"
    if controls and kept and pool == "complement":
        why += "; --pool all draws from all units"
    return dict(zip(names, (Undefined(why), Undefined(), Undefined())))
