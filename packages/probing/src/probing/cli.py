"""``trace probe``: circuit, subnetwork, linear, evaluate. Importing this module does not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from probing._errors import ProbingError


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


def _task_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.argument("model"),
            click.argument("data", type=click.Path(exists=True, dir_okay=False)),
            click.option("--label", required=True, metavar="COLUMN", help="Column with the variable's value."),
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
            click.option("--readout", required=True, metavar="KEY", help="attn_update_3, mlp_stream_5, resid_mid_0, …"),
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
@_mask_options
@click.option(
    "--loss",
    type=click.Choice(["contrastive", "linear"]),
    default="contrastive",
    show_default=True,
    help="What makes readouts of one label alike: their distances, or a linear readout.",
)
def circuit(model: str, data: str, **options: Any) -> None:
    """Train a circuit probe: masks under which a readout clusters by the variable.

    \b
    trace probe circuit MODEL rows.jsonl --label number --readout attn_update_0 --out runs/number
    """
    from probing import CircuitProbe, CircuitProbeConfig, evaluate

    network, _, task = _prepare(model, data, options)
    circuit_config, resid_config = _configs(network, options)
    trained = CircuitProbe(
        CircuitProbeConfig(options["readout"], circuit_config, resid_config, options["loss"]), network
    )
    trace = _fit(trained, task.train, options)
    knn = evaluate.evaluate_knn(trained, task.train, task.test)
    masks = trained.circuit.masks(readout=options["readout"], knn=knn.circuit.mean, knn_full=knn.full.mean)
    result = {
        "readout": options["readout"], "classes": task.names, "rows": [len(task.train), len(task.test)],
        "knn circuit": str(knn.circuit), "knn full model": str(knn.full), "chance": round(knn.chance, 4),
        "units kept": f"{masks.size} of {masks.total}", "seconds": round(trace.seconds, 2),
    }  # fmt: skip
    reading = (
        "The variable is computed here if the circuit's accuracy is well above the full model's and chance; an empty "
        "circuit at chance says it is not. Whether the model needs it is for trace probe evaluate."
    )
    _keep(options["out"], "Circuit probe", reading, result, masks, trace)
    _show(result, options["as_json"])


@probe.command("subnetwork")
@_task_options
@_mask_options
@click.option("--hidden", type=int, help="Width of an MLP probe; linear without.")
def subnetwork(model: str, data: str, **options: Any) -> None:
    """Train masks and a classifier together (Cao et al. 2021).

    \b
    trace probe subnetwork MODEL rows.jsonl --label pos --readout mlp_stream_3 --out runs/pos
    """
    import torch

    from probing import SubnetworkProbe, SubnetworkProbeConfig, evaluate

    network, _, task = _prepare(model, data, options)
    circuit_config, resid_config = _configs(network, options)
    config = SubnetworkProbeConfig(
        options["readout"], len(task.names), circuit_config, resid_config, options["hidden"] or -1, "sequence"
    )
    trained = SubnetworkProbe(config, network)
    trace = _fit(trained, task.train, options)
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
    _keep(options["out"], "Subnetwork probe", reading, result, masks, trace)
    _show(result, options["as_json"])


@probe.command("linear")
@_task_options
@click.option("--readout", required=True, metavar="KEY", help="attn_update_3, mlp_stream_5, resid_mid_0, …")
@click.option("--hidden", type=int, help="Width of an MLP probe; linear without.")
@click.option("--epochs", default=100, show_default=True, help="Passes over the training part.")
def linear(model: str, data: str, **options: Any) -> None:
    """Train an ordinary probe on a readout, beside a control task and LEACE erasure.

    \b
    trace probe linear MODEL rows.jsonl --label number --readout resid_mid_2
    """
    from probing import CircuitConfig, CircuitProbe, CircuitProbeConfig, beside, evaluate

    network, _, task = _prepare(model, data, options)
    reader = CircuitProbe(CircuitProbeConfig(options["readout"], CircuitConfig(), _resid(options["readout"])), network)
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
    _show(result, options["as_json"])


@probe.command("evaluate")
@_task_options
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

    network, tokenizer, task = _prepare(model, data, options)
    words = answers.split(",")
    if len(words) != len(task.names):
        raise click.UsageError(f"--answers names {len(words)} words, but the labels are {', '.join(task.names)}")
    circuit_masks = Masks.load(masks_path)
    tokens = [_continuation(tokenizer, word) for word in words]
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
        "drop of random circuits": effect.undefined or _rounded(effect.control_drop),
        "owed to the circuit": _rounded(effect.necessity),
        "p": _rounded(effect.p_value),
        "units": f"{circuit_masks.size} of {circuit_masks.total}",
    }  # fmt: skip
    _show(result, options["as_json"])


def _prepare(model: str, data: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from probing._task import load_task, read_rows

    rows = read_rows(data)
    test = read_rows(options["test"]) if options["test"] else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    task = load_task(
        rows, tokenizer, label=options["label"], text=options["text"], position=options["position"], test_rows=test,
        test_share=options["test_share"], seed=options["seed"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer, task


def _resid(key: str) -> Any:
    from probing import Readout, ResidualUpdateModelConfig

    readout = Readout.parse(key)
    part = readout.kind.partition("_")[0]
    return ResidualUpdateModelConfig(
        "auto",
        [readout.layer],
        attn=part == "attn",
        mlp=part == "mlp",
        cross=part == "cross",
        resid=part == "resid",
        heads=part == "head",
        stream=readout.kind.endswith("_stream"),
    )


def _configs(network: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    from probing import CircuitConfig, Readout
    from probing._structure import find_layout

    sites = list(options["sites"])
    if not sites:
        readout = Readout.parse(options["readout"])
        sites = _sub_block(network, find_layout(network, [readout.layer])[0], readout.kind, options["unit"])
    config = CircuitConfig(
        options["method"], {"mask_unit": options["unit"]}, sites, l0_lambda=options["l0_lambda"], seed=options["seed"]
    )
    return config, _resid(options["readout"])


def _sub_block(network: Any, layout: Any, kind: str, unit: str) -> list[str]:
    """What to mask where nobody says: the linear maps of the sub-block that the readout reads, or its projection."""
    from probing import find_sites

    part = 1 if kind.startswith("mlp") else 0
    if unit == "head":
        return [str(layout.projection)]
    if unit == "module":
        return [layout.mlp if part else layout.attn]
    around = layout.sources[part].rpartition(".")[0]
    return [site.path for site in find_sites(network, f"{around}.*", unit)]


def _fit(trained: Any, data: Any, options: dict[str, Any]) -> Any:
    import sys

    from probing import TrainPlan, fit

    plan = TrainPlan(
        epochs=options["epochs"],
        batch_size=options["batch_size"],
        lr=options["lr"],
        seed=options["seed"],
        target_sparsity=options["target_sparsity"],
    )
    batch = min(plan.batch_size, len(data))
    with click.progressbar(length=plan.epochs * (len(data) // batch), label="training", file=sys.stderr) as bar:
        return fit(trained, data, plan, progress=lambda step, steps, loss: bar.update(1))


def _keep(out: str, title: str, reading: str, result: dict[str, Any], masks: Any, trace: Any) -> None:
    from probing import plots
    from probing._report import write_report

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    masks.save(folder / "masks.safetensors")
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    figures = {"Units kept": plots.kept_by_layer([masks]), "Training": plots.training({"loss": trace})}
    write_report(folder / "report.html", title, reading, result, figures)
    click.echo(f"masks, result and report are in {folder}", err=True)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    width = max(map(len, result))
    for name, value in result.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(f"{name:<{width}}  {shown}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _continuation(tokenizer: Any, word: str) -> list[int]:
    """Tokens of a word as it continues a sentence."""
    before = tokenizer("The man", add_special_tokens=False).input_ids
    after = tokenizer("The man" + word, add_special_tokens=False).input_ids
    return after[len(before) :]
