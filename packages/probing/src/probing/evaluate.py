"""How good is a circuit? Ablations beside matched random controls, faithfulness, completeness, minimality, stability.

Every function takes a ``measure``: called with a model (the real one or an ablated one), it returns one number per
example, such as 1 for a right answer; intervals are bootstrapped over these examples.

    >>> from probing import evaluate
    >>> effect = evaluate.ablation(model, circuit, lambda m: correct(m, test))  # doctest: +SKIP
    >>> effect.drop, effect.control_drop, effect.undefined  # doctest: +SKIP
    (0.97, 0.04, None)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from probing._ablate import Ablated, How, Space
from probing._controls import Pool, Scope, sample_like, undefined_sites
from probing._errors import ConfigError, DataError, MaskError, check_choice
from probing._estimate import Estimate
from probing._knn import KnnResult, evaluate_knn, knn_accuracy, probed_vectors
from probing._masks import Masks, overlap

__all__ = [
    "Ablated",
    "AblationEffect",
    "Curve",
    "Estimate",
    "KnnResult",
    "ablation",
    "completeness",
    "evaluate_knn",
    "faithfulness",
    "knn_accuracy",
    "minimality",
    "probed_vectors",
    "sample_like",
    "size_curve",
    "stability",
]

Measure = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class AblationEffect:
    """What taking a circuit out does, beside what taking out random units of equal number does.

    Attributes:
        full: the measure on the whole model.
        ablated: … without the circuit.
        drop: their difference.
        controls: the measure without each random set; empty where no such set exists.
        control_drop: mean drop of the controls.
        necessity: ``drop − control_drop``: what is owed to this circuit rather than to its size.
        p_value: the share of controls (and the circuit itself) that drop at least as much.
        undefined: why there are no controls, or None. Never a magic number.
        kept: the circuit's share of units, by site.
    """

    full: Estimate
    ablated: Estimate
    drop: float
    controls: list[float]
    control_drop: float | None
    necessity: float | None
    p_value: float | None
    undefined: str | None
    kept: dict[str, float]


def ablation(
    model: nn.Module,
    circuit: Masks,
    measure: Measure,
    *,
    how: How = "zero",
    space: Space = "activation",
    reference: Mapping[str, Any] | None = None,
    controls: int = 20,
    pool: Pool = "complement",
    scope: Scope = "site",
    seed: int = 0,
    same_weights: bool = True,
) -> AblationEffect:
    """Remove the circuit, then ``controls`` random sets of the same size.

    Args:
        model: the whole model.
        circuit: the units to remove.
        measure: one number per example for a given model.
        how: ``"zero"``, ``"mean"``, ``"resample"`` or ``"random"``; see `Ablated`.
        space: ``"activation"`` or ``"weight"``.
        reference: inputs for means.
        controls: how many random sets; the smallest possible p-value is 1 / (controls + 1).
        pool: draw from outside the circuit, or from all units.
        scope: match sizes at every site, or in total.
        seed: of the draws.
        same_weights: refuse a circuit found in a model of other weights.
    """
    check_choice("pool", pool, ("all", "complement"))
    check_choice("scope", scope, ("site", "global"))
    if controls < 0:
        raise ConfigError(f"controls={controls}: how many random sets must be 0 or more")

    def without(units: Masks, draw: int = 0) -> Tensor:
        how_ = {"reference": reference, "seed": seed + draw, "same_weights": same_weights}
        return measure(Ablated(model, units, how, space, **how_))

    full, ablated = measure(model), without(circuit)
    drop = float(full.double().mean() - ablated.double().mean())
    kept = {path: float(mask.float().mean()) for path, mask in circuit.keep.items()}
    generator = torch.Generator().manual_seed(seed)
    reason, scores = None, []
    if not circuit.size:
        reason = "the circuit is empty: removing nothing has no control"
    elif not controls:
        reason = "no random circuits were asked for (controls=0)"
    else:
        try:
            for draw in range(controls):
                keep = sample_like(circuit.keep, generator, pool=pool, scope=scope)
                bias = sample_like(circuit.bias_keep, generator, pool="all") if circuit.bias_keep else {}
                random = replace(circuit, keep=keep, bias_keep=bias, logits={})
                scores.append(_mean(lambda _, random=random, draw=draw: without(random, draw), model))
        except MaskError:
            large = undefined_sites(circuit.keep)
            shown = ", ".join(f"{path} keeps {kept[path]:.0%}" for path in large) or f"{circuit.share:.0%} kept"
            reason = f"no equal-sized set lies outside the circuit ({shown})"
    mean_drop = float(full.double().mean()) - sum(scores) / len(scores) if scores else None
    return AblationEffect(
        Estimate.over_examples(full, seed=seed),
        Estimate.over_examples(ablated, seed=seed),
        drop,
        scores,
        mean_drop,
        None if mean_drop is None else drop - mean_drop,
        (1 + sum(score <= float(ablated.double().mean()) for score in scores)) / (1 + len(scores)) if scores else None,
        reason,
        kept,
    )


def faithfulness(model: nn.Module, circuit: Masks, measure: Measure, **how: Any) -> float:
    """(M(circuit) − M(empty)) / (M(full) − M(empty)): 1 where the circuit alone does what the model does.

    "Empty" has every unit of the circuit's sites removed (MIB, Mueller et al. 2025).

    Raises:
        DataError: the sites make no difference to the measure, so the ratio is undefined.
    """
    return _faithful(_mean(measure, model), _empty(model, circuit, measure, how), model, circuit, measure, how)


@dataclass(frozen=True)
class Curve:
    """Faithfulness over circuit sizes, and its two integrals.

    Attributes:
        sizes: shares of units kept, ascending.
        faithfulness: at each size.
        cpr: ∫ f(k) dk, the higher the better.
        cmd: ∫ |1 − f(k)| dk, best 0.
    """

    sizes: list[float]
    faithfulness: list[float]
    cpr: float
    cmd: float


def size_curve(
    model: nn.Module,
    scores: Masks,
    measure: Measure,
    sizes: Sequence[float] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    **how: Any,
) -> Curve:
    """Faithfulness of the circuits that keep the highest-scored units, for a grid of sizes (MIB's CPR and CMD).

    Args:
        model: the whole model.
        scores: masks with logits (trained ones have them); all sites are ranked together.
        measure: one number per example.
        sizes: shares of units, ascending within [0, 1].
        **how: as `Ablated`: how, space, reference, seed.

    Raises:
        MaskError: the masks carry no logits.
        ConfigError: sizes that are no ascending shares.
        DataError: the sites make no difference to the measure.
    """
    if list(sizes) != sorted(sizes) or not all(0 <= size <= 1 for size in sizes):
        raise ConfigError(f"sizes={tuple(sizes)} must be shares from 0 to 1, ascending")
    if not scores.logits:
        raise MaskError("these masks carry no logits to rank units by; use trained masks, not results of set algebra")
    flat = torch.cat([scores.logits[path].flatten() for path in scores.sites])
    rank = flat.argsort(descending=True).argsort()
    parts = rank.split([scores.keep[path].numel() for path in scores.sites])
    full, empty = _mean(measure, model), _empty(model, scores, measure, how)
    found = []
    for size in sizes:
        kept = round(size * len(flat))
        keep = {p: (part < kept).view(scores.keep[p].shape) for p, part in zip(scores.sites, parts)}
        circuit = replace(scores, keep=keep, logits={})
        found.append(_faithful(full, empty, model, circuit, measure, how))
    x, f = torch.tensor(list(sizes)).double(), torch.tensor(found).double()
    cpr, cmd = (float(torch.trapezoid(y, x)) for y in (f, (1 - f).abs()))
    return Curve(list(sizes), found, cpr, cmd)


@dataclass(frozen=True)
class Completeness:
    """|M(circuit − K) − M(model − K)| for random parts K of the circuit (Wang et al. 2023, §4.2); 0 is complete."""

    gaps: list[float]
    mean: Estimate
    worst: float


def completeness(
    model: nn.Module,
    circuit: Masks,
    measure: Measure,
    *,
    draws: int = 20,
    share: float = 0.5,
    seed: int = 0,
    **how: Any,
) -> Completeness:
    """Knock random parts out of the circuit and out of the whole model: a complete circuit suffers alike.

    Args:
        model: the whole model.
        circuit: the circuit.
        measure: one number per example.
        draws: how many parts K.
        share: of the circuit's units in each K.
        seed: of the draws.
        **how: as `Ablated`.
    """
    generator, gaps = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        knocked = {
            path: mask & (torch.rand(mask.shape, generator=generator).to(mask.device) < share)
            for path, mask in circuit.keep.items()
        }
        part = replace(circuit, keep=knocked, bias_keep=_no_bias(circuit), logits={})
        alone = _mean(measure, Ablated(model, ~(circuit - part), **how))
        gaps.append(abs(alone - _mean(measure, Ablated(model, part, **how))))
    return Completeness(gaps, Estimate.over_draws(gaps), max(gaps))


@dataclass(frozen=True)
class Minimality:
    """What single units are worth.

    Attributes:
        inside: M(circuit) − M(circuit without v), for sampled units v of the circuit, by ``path[index]``.
        outside: M(circuit with v) − M(circuit), for as many units outside it: the null distribution.
        needed: the share of sampled inside units worth more than 95 % of the outside ones.
    """

    inside: dict[str, float]
    outside: dict[str, float]
    needed: float


def minimality(
    model: nn.Module, circuit: Masks, measure: Measure, *, units: int = 20, seed: int = 0, **how: Any
) -> Minimality:
    """Take units out of the circuit one by one, and put others in.

    Args:
        model: the whole model.
        circuit: a circuit with units inside and outside.
        measure: one number per example.
        units: how many of each are sampled.
        seed: of the sample.
        **how: as `Ablated`.

    Raises:
        MaskError: the circuit is empty or everything.
    """
    if not 0 < circuit.size < circuit.total:
        raise MaskError(
            f"minimality compares units inside and outside, but the circuit keeps {circuit.size} of {circuit.total}"
        )
    base = _mean(measure, Ablated(model, ~circuit, **how))
    generator = torch.Generator().manual_seed(seed)
    inside, outside = (_sample_units(masks, units, generator) for masks in (circuit, ~circuit))
    worth = {name: base - _mean(measure, Ablated(model, ~(circuit - one), **how)) for name, one in inside.items()}
    null = {name: _mean(measure, Ablated(model, ~(circuit | one), **how)) - base for name, one in outside.items()}
    bar = torch.tensor(list(null.values())).quantile(0.95)
    return Minimality(worth, null, sum(value > float(bar) for value in worth.values()) / len(worth))


@dataclass(frozen=True)
class Stability:
    """Jaccard indices of the same circuit found with different seeds, and what chance would give at these sizes."""

    jaccard: Estimate
    if_independent: float
    core: Masks
    """Units found with every seed."""


def stability(circuits: Sequence[Masks]) -> Stability:
    """Agreement of circuits over seeds.

    Raises:
        DataError: fewer than two circuits.
    """
    if len(circuits) < 2:
        raise DataError("stability compares circuits over seeds: give at least two")
    pairs = [overlap(a, b) for a, b in combinations(circuits, 2)]
    core = circuits[0]
    for other in circuits[1:]:
        core = core & other
    expected = sum(pair["jaccard_if_independent"] for pair in pairs) / len(pairs)
    return Stability(Estimate.over_draws([pair["jaccard"] for pair in pairs]), expected, core)


def _mean(measure: Measure, model: nn.Module) -> float:
    return float(measure(model).double().mean())


def _empty(model: nn.Module, circuit: Masks, measure: Measure, how: Mapping[str, Any]) -> float:
    everything = circuit | ~circuit
    return _mean(measure, Ablated(model, everything, **how))


def _faithful(
    full: float, empty: float, model: nn.Module, circuit: Masks, measure: Measure, how: Mapping[str, Any]
) -> float:
    if full == empty:
        raise DataError(
            f"faithfulness is undefined: the measure is {full:.4g} with all units of the circuit's sites and without "
            "any, so these sites do not matter to it"
        )
    return (_mean(measure, Ablated(model, ~circuit, **how)) - empty) / (full - empty)


def _no_bias(masks: Masks) -> dict[str, Tensor]:
    return {path: torch.zeros_like(mask) for path, mask in masks.bias_keep.items()}


def _sample_units(masks: Masks, count: int, generator: torch.Generator) -> dict[str, Masks]:
    """Single-unit masks for ``count`` units of a circuit, named ``path[index]``."""
    every = [(path, int(i)) for path, mask in masks.keep.items() for i in mask.flatten().nonzero().flatten().tolist()]
    chosen = [every[i] for i in torch.randperm(len(every), generator=generator)[:count].tolist()]
    found = {}
    for path, index in chosen:
        keep = {p: torch.zeros_like(mask) for p, mask in masks.keep.items()}
        keep[path].view(-1)[index] = True
        found[f"{path}[{index}]"] = replace(masks, keep=keep, bias_keep=_no_bias(masks), logits={})
    return found
