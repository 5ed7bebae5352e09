"""The normaliser of a run: from an optimiser, from another run, or fitted; kept beside the rows that it scaled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attribute._errors import DataError, RunError
from attribute.batching import assemble, plan_batches
from attribute.data import TokenFile
from attribute.engine import evaluating, finite_losses
from attribute.model import LanguageModel
from attribute.processes import current
from attribute.progress import Progress, Quiet
from gradcore import (
    CapturePlan,
    GradCoreError,
    Identity,
    ModuleGradient,
    ModulePlan,
    Normalizer,
    optimizer_moments,
)

if TYPE_CHECKING:
    from attribute.config import IndexConfig

NORMALIZER = "normalizer.safetensors"


def normalizer_for(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    config: IndexConfig,
    progress: Progress | None = None,
) -> Normalizer | None:
    """The normaliser that a configuration asks for, or none.

    Raises:
        RunError: there is none where ``processor_path`` points, or of another kind.
        GradCoreError: an optimiser's state that is not this model's.
    """
    if config.processor_path:
        found = load_normalizer(Path(config.processor_path))
        if found is None:
            raise RunError(
                f"{config.processor_path} holds no normaliser: make one with trace preconditioners --normalizer adam"
            )
        if config.normalizer and config.normalizer != found.kind:
            raise RunError(f"{config.processor_path} holds the normaliser {found.kind}, not {config.normalizer}")
        return found
    if not config.normalizer:
        return None
    if config.optimizer_state_path:
        moments = planned_moments(moments_of(model, config.optimizer_state_path), plan)
        return Normalizer.of_moments(config.normalizer, moments)
    return fit_normalizer(
        model,
        tokens,
        plan,
        config.normalizer,
        sample=config.stats_sample_size,
        budget=config.token_batch_size,
        progress=progress,
    )


def shared_normalizer(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    config: IndexConfig,
    progress: Progress | None = None,
) -> Normalizer | None:
    """:func:`normalizer_for` by the first process, for all of them."""
    here = current()
    found = normalizer_for(model, tokens, plan, config, progress) if here.first or model.sharded else None
    return here.from_first(lambda: found)


def fit_normalizer(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    kind: str = "adam",
    *,
    sample: int = 10_000,
    budget: int = 4096,
    progress: Progress | None = None,
) -> Normalizer:
    """A normaliser from the mean of the squared gradients of a sample of rows: the V of a model without its optimiser.

    Args:
        model, tokens: the rows the moments are taken of.
        plan: which modules; heads share the moments of their module.
        kind: ``adam``, ``adafactor`` or ``shampoo``.
        sample: rows at most, drawn by the seed of the plan's sketch; 0 takes all.
        budget: padded tokens a batch.
        progress: told of the pass.

    Raises:
        DataError: no row has a token with a loss.
    """
    moments = fit_moments(model, tokens, plan, kind, sample=sample, budget=budget, progress=progress)
    return Normalizer.of_moments(kind, moments)


def fit_moments(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    what: str = "adam",
    *,
    sample: int = 10_000,
    batch: int = 1,
    budget: int = 4096,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The mean of the squared gradients of a sample of rows, by module ``[out, in]``: as for :func:`fit_normalizer`.

    With ``batch`` above 1, that of the mean gradient of as many rows, drawn independently: E[g]² + Var[g] / batch.
    """
    progress = progress or Quiet()
    whole = replace(plan, modules=_whole_modules(model, plan), sketch=Identity(), normalizer=None)
    rows = np.array([row for row in range(len(tokens)) if tokens.labelled(row)[1:].any()], dtype=np.int64)
    if not len(rows):
        raise DataError("a normaliser is fitted to rows with a loss, and there are none")
    if sample and sample < len(rows):
        seed = getattr(plan.sketch, "seed", 0)
        rows = np.sort(np.random.default_rng(seed).choice(rows, sample, replace=False))
    sums: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    calls: dict[str, list[ModuleGradient]] = {}

    def hold(gradient: ModuleGradient) -> None:
        calls.setdefault(gradient.name, []).append(gradient)

    progress.start(f"moments for {what}", int(tokens.lengths[rows].sum()), "tokens")
    with torch.enable_grad(), evaluating(model), model.collector(whole, factors=hold):
        for chosen in plan_batches(tokens.lengths, rows, budget):
            finite_losses(model, assemble(tokens, chosen, model.device), plan).sum().backward()
            for name, parts in calls.items():
                joined = ModuleGradient.joined(parts)
                sums[name] = _power_sum(joined, 2, sums.get(name))
                if batch > 1:
                    totals[name] = _power_sum(joined, 1, totals.get(name))
            calls.clear()
            progress.advance(int(tokens.lengths[chosen].sum()))
    progress.stop()
    found = {name: each / len(rows) for name, each in sums.items()}
    for name, total in totals.items():
        mean = (total / len(rows)).square_()
        found[name] = mean + (found[name] - mean) / batch
    return {name: each.float().cpu() for name, each in found.items()}


def _power_sum(gradient: ModuleGradient, power: int, total: Tensor | None) -> Tensor:
    """``Σ_n G_n`` or ``Σ_n G_n²`` ``[out, in]`` of a batch, in blocks of rows, added to what there is."""
    for _, block in gradient.blocks():
        part = (block.square() if power == 2 else block).sum(0, dtype=torch.float64)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _whole_modules(model: LanguageModel, plan: CapturePlan) -> tuple[ModulePlan, ...]:
    modules: dict[str, ModulePlan] = {}
    for each in plan.modules:
        if each.head is not None:
            modules.setdefault(each.path, ModulePlan.of(each.path, model.module(each.path), False))
        else:
            modules[each.matrix] = each
    return tuple(modules.values())


def moments_of(model: LanguageModel, state: str | Path) -> dict[str, Tensor]:
    """The second moments that an ``optimizer.pt``, or the checkpoint folder with it, has of a model's modules."""
    return optimizer_moments(model.model, state, within=model.base, outside=model.outside)


def state_beside(model: str) -> str:
    """The ``optimizer.pt`` in a model's folder, as a trainer's checkpoint has it; ``""`` where there is none."""
    file = Path(model) / "optimizer.pt"
    return str(file) if model and file.is_file() else ""


def default_note(kind: str, state: str) -> str:
    """What to say of a normaliser that nobody asked for: where its second moments are from."""
    taken = f"those of {state} (--normalizer {kind} fits them instead)" if state else "fitted to the rows"
    return f"normaliser: {kind}, with second moments {taken}"


def planned_moments(moments: Mapping[str, Tensor], plan: CapturePlan) -> dict[str, Tensor]:
    """The planned modules' moments; without the bias's column where biases are not captured."""
    missing = sorted({each.matrix for each in plan.modules} - set(moments))
    if missing:
        raise RunError(
            f"the optimiser has no second moments of {len(missing)} captured modules, such as {missing[0]}: it did not "
            "train them. Leave them out with --exclude, or fit the moments (without --optimizer-state-path)"
        )
    return {
        each.path: moments[each.path] if each.head else moments[each.path][:, : each.in_features]
        for each in plan.modules
    }


def save_normalizer(path: Path, normalizer: Normalizer | None) -> None:
    """Write a normaliser into a folder; there is nothing to write where there is none."""
    from safetensors.torch import save_file

    if normalizer is not None:
        path.mkdir(parents=True, exist_ok=True)
        aside = path / f"{NORMALIZER}.tmp"
        # One entry: safetensors writes several in any order, and a run's bytes are to be the same every time.
        about = json.dumps({"kind": normalizer.kind, "digest": normalizer.digest})
        save_file(normalizer.tensors(), aside, metadata={"normalizer": about})
        os.replace(aside, path / NORMALIZER)


def load_normalizer(path: Path) -> Normalizer | None:
    """What :func:`save_normalizer` wrote into a folder, or none.

    Raises:
        RunError: the file is torn, or not one of a normaliser.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    file = path / NORMALIZER
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as stream:
            about = json.loads((stream.metadata() or {})["normalizer"])
            found = Normalizer.from_tensors(about["kind"], load_file(file))
    except (SafetensorError, GradCoreError, KeyError) as error:
        raise RunError(f"{file} is not a normaliser: {error}") from error
    if found.digest != about.get("digest"):
        raise RunError(f"{file} is not the file that was written (torn or changed)")
    return found


def with_normalizer(plan: CapturePlan, path: Path) -> CapturePlan:
    """The plan of a run, able to capture: its normaliser's scales are read from the folder.

    Raises:
        RunError: they are missing, or others than the run was made with.
    """
    if plan.normalizer is None:
        return plan
    found = load_normalizer(path)
    if found is None:
        raise RunError(
            f"{path} was made with the normaliser {plan.normalizer.kind}, whose {NORMALIZER} is missing: copy it there"
        )
    if found != plan.normalizer:
        raise RunError(f"{path / NORMALIZER} is not the normaliser of this run")
    return replace(plan, normalizer=found)
