"""Many probes of one model at once: other variables, penalties, seeds or layers, one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probing._data import ProbeData
from probing._errors import ConfigError, DataError
from probing._fit import Trace, TrainPlan
from probing._intervene import Intervention
from probing._losses import soft_nearest_neighbour
from probing._prefix import Prefix
from probing._probes import CircuitProbe
from probing._readout import Readout
from probing._sites import Site

_ROWWISE = ("neuron", "input", "head")


def fit_many(
    probes: Sequence[CircuitProbe],
    data: Sequence[ProbeData],
    plan: TrainPlan | None = None,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[Trace]:
    """Train circuit probes of one model together; each ends as `fit` would have left it.

    >>> lambdas = [1e-7, 1e-6, 1e-5]  # doctest: +SKIP
    >>> probes = [CircuitProbe(config(l0_lambda), model) for l0_lambda in lambdas]  # doctest: +SKIP
    >>> fit_many(probes, [data] * 3)  # doctest: +SKIP

    Probes of one readout and the same sites make one batch, each row under its own probe's mask; those of other layers
    or sub-blocks run beside it, and all have one loss, one backward pass and one step. On an accelerator that fills the
    device; on one CPU thread it saves only the overhead of the steps.

    Args:
        probes: on one model, with readouts of one width; λ, seed, readout and sites may differ.
        data: one for each probe: the same inputs and positions, one position a row; labels may differ.
        plan: for all; no target sparsity and no early stop here.
        progress: called with (step, steps, mean loss of the probes), as `fit` calls it.

    Raises:
        ConfigError: probes that do not fit together.
        DataError: data that do not.
    """
    plan, began = plan or TrainPlan(), time.perf_counter()
    _check(probes, data, plan)
    groups = _groups(probes)
    prefixes = [Prefix(probes[group[0]].eval(), data[group[0]]) for group in groups]
    with torch.no_grad():
        if len({prefix.vectors(torch.arange(1), []).shape[-1] for prefix in prefixes}) > 1:
            raise ConfigError("probes trained together have readouts of one width")
    order_of_probes = [place for group in groups for place in group]
    labels = torch.stack([data[place].labels for place in order_of_probes])
    count, batch = len(data[0]), min(plan.batch_size, len(data[0]))
    per_epoch = count // batch if plan.drop_last else -(-count // batch)
    steps = plan.epochs * per_epoch
    parameters = [p for probe in probes for p in probe.circuit.site_masks.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    order, generator = torch.empty(0), torch.Generator().manual_seed(plan.seed)
    losses, temperatures = [], []
    for probe in probes:
        probe.train()
    for step in range(steps):
        at = step % per_epoch
        if at == 0:
            order = torch.randperm(count, generator=generator)
        rows = order[at * batch : (at + 1) * batch]
        temperatures.append(plan.temperature(step, steps))
        for probe in probes:
            probe.circuit.temperature = temperatures[-1]
        found = []
        for prefix, group in zip(prefixes, groups):
            masks = _together([probes[place].circuit.interventions() for place in group], len(rows))
            found.append(prefix.vectors(rows.repeat(len(group)), masks).unflatten(0, (len(group), -1)))
        loss = soft_nearest_neighbour(torch.cat(found) if len(found) > 1 else found[0], labels[:, rows])
        optimiser.zero_grad(set_to_none=True)
        (loss.sum() + sum(_penalty(probe, plan, step, steps) for probe in probes)).backward()
        optimiser.step()
        losses.append(loss.detach())
        if progress is not None:
            progress(step + 1, steps, float(losses[-1].mean()))
    for probe in probes:
        probe.eval()
    table = dict(zip(order_of_probes, torch.stack(losses).T.tolist()))
    seconds = time.perf_counter() - began
    return [Trace(table[place], [], list(temperatures), seconds) for place in range(len(probes))]


def _groups(probes: Sequence[CircuitProbe]) -> list[list[int]]:
    """Places of the probes that share readout, sites and whether biases are masked."""
    groups: dict[tuple[Readout, tuple[Site, ...], bool], list[int]] = {}
    for place, probe in enumerate(probes):
        key = (probe.readout, tuple(probe.circuit.sites), probe.circuit.config.mask_bias)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def _together(each: Sequence[list[Intervention]], rows: int) -> list[Intervention]:
    """One intervention a site, with a mask of its own for every row."""
    return [
        Intervention(
            site[0].site,
            torch.stack([item.keep for item in site]).repeat_interleave(rows, 0),
            _rows([item.bias_keep for item in site], rows),
        )
        for site in zip(*each)
    ]


def _rows(masks: Sequence[Tensor | None], rows: int) -> Tensor | None:
    given = [mask for mask in masks if mask is not None]
    return torch.stack(given).repeat_interleave(rows, 0) if given else None


def _penalty(probe: CircuitProbe, plan: TrainPlan, step: int, steps: int) -> Tensor | float:
    config = probe.config.circuit_config
    if not config.add_l0:
        return 0.0
    weight = config.l0_lambda if plan.l0_lambda is None else plan.l0_lambda(step, steps)
    return weight * probe.circuit.l0_loss()


def _check(probes: Sequence[CircuitProbe], data: Sequence[ProbeData], plan: TrainPlan) -> None:
    if not probes or len(probes) != len(data):
        raise ConfigError(f"{len(probes)} probes but {len(data)} data: give one for each probe")
    for probe in probes:
        if probe.base is not probes[0].base:
            raise ConfigError("probes trained together share one model")
        if probe.config.loss != "contrastive" or any(site.unit not in _ROWWISE for site in probe.circuit.sites):
            units = ", ".join(_ROWWISE)
            raise ConfigError(f"probes trained together have the contrastive loss and units of kind {units}")
        if not probe.circuit.rule.trainable:
            raise ConfigError(f"{probe.circuit.config.mask_method!r} has no parameters, so there is nothing to train")
        if not all(mask.active for mask in probe.circuit.each()):
            raise ConfigError("probes trained together have all their masks on: use_masks(True), or use fit")
    if plan.target_sparsity is not None or plan.stop_undecided is not None:
        raise ConfigError("target_sparsity and stop_undecided steer single runs: use fit")
    if any(part.inputs is not data[0].inputs and not _same(part, data[0]) for part in data):
        raise DataError("probes trained together look at the same inputs and positions; only labels may differ")
    if not data[0].single:
        raise DataError("probes trained together probe one position a row")


def _same(a: ProbeData, b: ProbeData) -> bool:
    inputs = a.inputs.keys() == b.inputs.keys() and all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
    return inputs and torch.equal(a.token_mask, b.token_mask)
