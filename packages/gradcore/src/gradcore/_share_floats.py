"""Floats of a row shared out: modules with more of the gradient get more of them.

A random sketch of k floats errs in ⟨G, H⟩ of a module by about ‖G‖‖H‖/√k, and a row's error is the sum over its
modules. With Σk fixed, the sum of squares Σ E_m²/k_m is least where k_m ∝ E_m, E_m the module's share of squared norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._module_gradient import ModuleGradient
from gradcore._plan import CapturePlan
from gradcore.sketches import Budgeted

STEP = 16
"""Budgets are multiples of it: transforms of round lengths are fast."""


def share_floats(plan: CapturePlan, total: int = 0, by: Mapping[str, float] | None = None) -> CapturePlan:
    """The plan with the floats of a row shared by its modules.

    >>> from torch import nn
    >>> from gradcore import TensorSketch
    >>> model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 192, bias=False))
    >>> plan = CapturePlan.for_model(model, sketch=TensorSketch(256))
    >>> share_floats(plan).columns, share_floats(plan, by={"0": 0.875, "1": 0.125}).columns
    ({'0': 128, '1': 384}, {'0': 448, '1': 64})

    Args:
        plan: with a tensor, dense or sparse sketch.
        total: floats a row; as many as the plan has where it is 0.
        by: weights of the modules, such as :func:`energies` gives; the entries of their gradients by default.

    Returns:
        Budgets in steps of 16, at least 16 a module and at most what it has; never more than ``total``, unless that is
        less than 16 a module.

    Raises:
        GradCoreError: the sketch has no budgets; a module has no weight, or one that is negative or not finite.
    """
    if not isinstance(plan.sketch, Budgeted):
        raise GradCoreError(f"a {plan.sketch.kind} sketch does not share floats: take a tensor, dense or sparse one")
    whole = {each.name: each.out_features * each.in_features for each in plan.modules}
    weights = {name: float(size) for name, size in whole.items()} if by is None else dict(by)
    if missing := [name for name in whole if name not in weights]:
        raise GradCoreError(f"no weight for {missing[0]}: floats are shared by all {len(whole)} modules of the plan")
    weight = torch.tensor([weights[name] for name in whole], dtype=torch.double)
    if not (torch.isfinite(weight).all() and (weight >= 0).all() and weight.any()):
        raise GradCoreError("weights must be finite, none negative and not all zero")
    counts = _shares(weight, torch.tensor(list(whole.values())), total or plan.width)
    return replace(plan, sketch=plan.sketch.with_budgets(dict(zip(whole, counts.tolist()))))


def energies(gradients: Iterable[ModuleGradient]) -> dict[str, float]:
    """Each module's share of an example's squared norm, on average over one batch; they sum to 1.

    Args:
        gradients: of all modules of a batch, as a collector's ``factors`` received them.

    Raises:
        GradCoreError: no example has a gradient.
    """
    held: dict[str, list[ModuleGradient]] = {}
    for each in gradients:
        held.setdefault(each.name, []).append(each)
    if not held:
        raise GradCoreError("no gradients to take energies of")
    squares = torch.stack([ModuleGradient.joined(parts).sq_norm().double() for parts in held.values()])  # [modules, n]
    norms = squares.sum(0)
    if not norms.any():
        raise GradCoreError("no example has a gradient")
    return dict(zip(held, (squares[:, norms > 0] / norms[norms > 0]).mean(1).tolist()))


def _shares(weight: Tensor, whole: Tensor, total: int) -> Tensor:
    """Multiples of STEP in proportion to the weights; what a module that is kept whole leaves over goes to others."""
    least = torch.minimum(whole, torch.tensor(STEP))
    share = torch.zeros_like(weight)
    fixed = torch.zeros_like(whole, dtype=torch.bool)
    while not fixed.all():
        left = total - share[fixed].sum()
        free = weight * ~fixed
        share[~fixed] = (left * weight / free.sum().clamp_min(1e-300))[~fixed]
        # Too small ones first: what they take must come from the others before those are found too large.
        off = ~fixed & (share < least)
        off = off if off.any() else ~fixed & (share > whole)
        if not off.any():
            break
        share[off] = share.clamp(least, whole)[off]
        fixed |= off
    counts = torch.where(share >= whole, whole, torch.maximum(share.long() // STEP * STEP, least))
    steps = (total - int(counts.sum())) // STEP
    lost = torch.where(counts + STEP <= whole, share - counts, -torch.inf)
    more = lost.argsort(descending=True, stable=True)[: max(steps, 0)]
    counts[more[lost[more] > 0]] += STEP
    return counts
