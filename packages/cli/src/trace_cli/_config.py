"""From command-line options to the library's configurations."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import click

from attribute import DataConfig, IndexConfig
from trace_cli._progress import Bars


def index_config(options: dict[str, Any], progress: Bars) -> IndexConfig:
    """Fill the configuration; neither model nor dataset means the demo's."""
    values = {**options, "sketch_kind": options.get("sketch_kind") or ""}
    values["sketch_budget"] = options.get("sketch_budget") or ""
    normalizer_fields(values)
    if not values["model"] and not values["dataset"]:
        from attribute.demo.run import demo_config
        from attribute.processes import current

        progress.note("neither --model nor --dataset: taking the demo's")
        demo = current().from_first(lambda: demo_config(progress))
        values["model"], values["dataset"] = demo.model, demo.data.dataset
    for name in ("model", "dataset"):
        if not values[name]:
            raise click.UsageError(f"--{name} is missing (without --model and --dataset the demo's are used)")
    data = DataConfig(**{each.name: values.pop(each.name) for each in fields(DataConfig)})
    return replace(IndexConfig(**values), data=data)


def normalizer_fields(values: dict[str, Any]) -> None:
    """What was not asked for is ``""`` in a configuration."""
    for name in ("processor_path", "optimizer_state_path", "normalizer"):
        if name in values:
            values[name] = "" if values[name] in (None, "none") else values[name]
