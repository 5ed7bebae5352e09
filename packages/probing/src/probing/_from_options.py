"""What the options of ``trace probe`` ask for: model, task, configuration, training; and where the results go.

Importing this module does not import torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def prepare(model: str, data: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and the task of one label."""
    network, tokenizer, (task,) = prepare_many(model, data, [options["label"]], options)
    return network, tokenizer, task


def prepare_many(model: str, data: str, labels: Sequence[str], options: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """The model, its tokenizer, and a task a label: the same rows and positions, other variables."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from probing import DataError
    from probing._task import load_task, read_rows

    rows = read_rows(data)
    test = read_rows(options["test"]) if options["test"] else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = []
    for label in labels:
        try:
            tasks.append(
                load_task(
                    rows, tokenizer, label=label, text=options["text"], position=options["position"], test_rows=test,
                    test_share=options["test_share"], seed=options["seed"],
                )
            )  # fmt: skip
        except DataError as error:
            raise error if len(labels) == 1 else DataError(f"label {label!r}: {error}") from None
    return AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer, tasks


def resid_of(key: str) -> Any:
    """The readout's configuration."""
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


def configs(network: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """What is masked, and what is read."""
    from probing import CircuitConfig, Readout
    from probing._structure import find_layout

    sites = list(options["sites"])
    if not sites:
        readout = Readout.parse(options["readout"])
        sites = _sub_block(network, find_layout(network, [readout.layer])[0], readout.kind, options["unit"])
    config = CircuitConfig(
        options["method"], {"mask_unit": options["unit"]}, sites, l0_lambda=options["l0_lambda"], seed=options["seed"]
    )
    return config, resid_of(options["readout"])


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


def plan_of(options: dict[str, Any]) -> Any:
    """How to train."""
    from probing import TrainPlan

    return TrainPlan(
        epochs=options["epochs"],
        batch_size=options["batch_size"],
        lr=options["lr"],
        seed=options["seed"],
        target_sparsity=options["target_sparsity"],
    )


def train(probe: Any, data: Any, options: dict[str, Any]) -> Any:
    """One probe, with a bar."""
    from probing import fit

    plan = plan_of(options)
    with _bar(plan, data) as bar:
        return fit(probe, data, plan, progress=lambda step, steps, loss: bar.update(1))


def train_together(probes: Sequence[Any], data: Sequence[Any], options: dict[str, Any]) -> list[Any]:
    """Several probes as one batch, with a bar."""
    from probing import fit_many

    plan = plan_of(options)
    with _bar(plan, data[0]) as bar:
        return fit_many(probes, data, plan, progress=lambda step, steps: bar.update(1))


def _bar(plan: Any, data: Any) -> Any:
    steps = plan.epochs * (len(data) // min(plan.batch_size, len(data)))
    return click.progressbar(length=steps, label="training", file=sys.stderr)


def keep(folder: Path, title: str, reading: str, result: dict[str, Any], masks: Any, trace: Any) -> None:
    """Masks, result.json and report.html of one probe."""
    from probing import plots
    from probing._report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    masks.save(folder / "masks.safetensors")
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    figures = {"Units kept": plots.kept_by_layer([masks]), "Training": plots.training({"loss": trace})}
    write_report(folder / "report.html", title, reading, result, figures)


def show(result: dict[str, Any], as_json: bool) -> None:
    """A result as lines, or as JSON."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    width = max(map(len, result))
    for name, value in result.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        click.echo(f"{name:<{width}}  {shown}")


def show_table(results: dict[str, dict[str, Any]], columns: Sequence[str]) -> None:
    """A line a variable."""
    lines = [("variable", *columns), *((name, *(str(each[at]) for at in columns)) for name, each in results.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip())


def rounded(value: float | None) -> float | None:
    """Four places, where there is a number."""
    return None if value is None else round(value, 4)


def continuation(tokenizer: Any, word: str) -> list[int]:
    """Tokens of a word as it continues a sentence."""
    before = tokenizer("The man", add_special_tokens=False).input_ids
    after = tokenizer("The man" + word, add_special_tokens=False).input_ids
    return after[len(before) :]
