"""Fitting a spectral sketch: two runs over a sample, one for the bases, one for the moments in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradcore._collector import GradientCollector
from gradcore._errors import CaptureError, GradCoreError
from gradcore._module_gradient import ModuleGradient
from gradcore._module_plan import ModulePlan
from gradcore._plan import CapturePlan
from gradcore.sketches import Identity, ModuleBasis, Spectral, SpectralBasis

REACH = 8.0
"""Rows and columns of the corner that is searched, in units of √floats."""

FORMED = 1 << 22
"""Entries of gradients that are formed at once."""

WIDEST = 16_384
"""Features of a side, above which a matrix has no basis."""


def fit_spectral(
    model: nn.Module,
    plan: CapturePlan,
    run: Callable[[], object],
    *,
    floats: int = 256,
    total: int = 0,
    seed: int = 0,
    outside: Mapping[str, nn.Module] | None = None,
) -> CapturePlan:
    """The plan with a spectral sketch fitted to a sample.

    >>> import torch
    >>> from torch import nn
    >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(64, 8)
    >>> plan = fit_spectral(model, CapturePlan.for_model(model), lambda: model(x).square().sum().backward(), floats=9)
    >>> plan.columns
    {'0': 9, '2': 9}

    Args:
        model: the model.
        plan: which modules; its sketch is replaced.
        run: forward and backward over every batch of the sample; called twice.
        floats: kept a module, where no total is given.
        total: floats a row shared by all modules: those coordinates of any module with the largest moments.
        seed: of the tensor sketch of modules without a basis: lookup tables, and matrices with a side above 16,384.
        outside: planned modules outside the model, as for a collector.

    Raises:
        CaptureError: the sample gave some module no gradient at all.
    """
    matrices = [each for each in plan.modules if each.kind != "embedding" and _has_basis(each)]
    if not matrices:
        raise CaptureError(
            "a spectral sketch needs a module that is neither a lookup table nor wider than "
            f"{WIDEST:,} features: use a tensor sketch"
        )
    factors = {each.name: _Factors() for each in matrices}
    part = replace(plan, modules=tuple(matrices))
    with _accumulating(model, part, factors, outside):
        run()
    # Where modules share, one may take several times its equal part.
    most = 4 * math.ceil(total / len(matrices)) if total else floats
    corners: dict[str, _Corner] = {}
    for each in matrices:
        found = factors[each.name].sides()
        if found is None:
            raise CaptureError(f"the sample gave {each.name} no gradient: a basis cannot be fitted to it")
        rows, columns = _sides(len(found[0]), len(found[1]), most)
        corners[each.name] = _Corner(leading(found[0], rows), leading(found[1], columns))
        factors[each.name] = _Factors()  # the covariances are no longer needed
    with _accumulating(model, part, corners, outside):
        run()
    counts = _shared(corners, total) if total else dict.fromkeys(corners, floats)
    bases = {each.name: corners[each.name].keep(counts[each.name]) for each in matrices}
    bases = {name: basis for name, basis in bases.items() if len(basis.pairs)}
    basis = SpectralBasis(bases)
    budgets = tuple((name, len(basis.modules[name].pairs)) for name in bases if total) if total else ()
    return replace(plan, sketch=Spectral(floats, basis.digest, budgets, seed, 0, basis))


def with_residual(plan: CapturePlan, share: float = 0.25) -> CapturePlan:
    """A fitted plan that gives most of its floats to a sketch of what its basis leaves out.

    >>> import torch
    >>> from torch import nn
    >>> model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(64, 8)
    >>> plan = CapturePlan.for_model(model)
    >>> plan = fit_spectral(model, plan, lambda: model(x).square().sum().backward(), floats=16, total=32)
    >>> with_residual(plan).width, with_residual(plan).sketch.residual
    (32, 12)

    Args:
        plan: from :func:`fit_spectral` with a total.
        share: of the floats for the coordinates with the largest moments.

    Raises:
        GradCoreError: the plan has no fitted basis, or one whose modules do not share a total.
    """
    sketch = plan.sketch
    if not isinstance(sketch, Spectral) or sketch.basis is None or not sketch.budgets:
        raise GradCoreError("a residual needs a spectral sketch fitted with a total that modules share")
    modules = sketch.basis.modules
    total = sum(len(basis.pairs) for basis in modules.values())
    lead = max(2 * len(modules), round(share * total))
    every = torch.cat([basis.moments for basis in modules.values()])
    owner = torch.cat([torch.full((len(basis.pairs),), i) for i, basis in enumerate(modules.values())])
    counts = torch.bincount(owner[every.argsort(descending=True, stable=True)[:lead]], minlength=len(modules))
    kept = {
        name: _first(basis, min(max(2, int(count)), len(basis.pairs)))
        for (name, basis), count in zip(modules.items(), counts)
    }
    left = SpectralBasis(kept)
    budgets = tuple((name, len(basis.pairs)) for name, basis in kept.items())
    residual = (total - sum(count for _, count in budgets)) // len(kept)
    return replace(plan, sketch=Spectral(sketch.floats, left.digest, budgets, sketch.seed, residual, left))


def _first(basis: ModuleBasis, count: int) -> ModuleBasis:
    """The ``count`` coordinates with the largest moments, with no more of either basis than they use."""
    columns = basis.in_basis.shape[1]
    row, column = basis.pairs[:count] // columns, basis.pairs[:count] % columns
    rows, used = int(row.max()) + 1, int(column.max()) + 1
    return ModuleBasis(
        basis.out_basis[:, :rows].contiguous(),
        basis.in_basis[:, :used].contiguous(),
        row * used + column,
        basis.moments[:count].contiguous(),
    )


def _has_basis(planned: ModulePlan) -> bool:
    """An eigendecomposition of a side takes time with its cube: an output embedding's is out of reach."""
    return planned.elementwise or max(planned.out_features, planned.in_features) <= WIDEST


def _sides(out_features: int, in_features: int, floats: int) -> tuple[int, int]:
    """Rows and columns of the corner: REACH · √floats, and more on one side where the other is too narrow for that."""
    reach = math.ceil(REACH * math.sqrt(floats))
    columns = min(in_features, reach)
    rows = min(out_features, max(reach, math.ceil(floats / columns)))
    return rows, min(in_features, max(columns, math.ceil(floats / rows)))


def leading(covariance: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, ``[d, ≤ count]`` float32, each with its largest entry positive."""
    vectors = torch.linalg.eigh(covariance.double())[1].flip(1)[:, :count]
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * peaks.sign()).float()


class _Factors:
    """What the bases of one module are the eigenvectors of.

    A side's matrix is a sum of two: the covariance of the factor over positions, Σ_s g_s g_sᵀ (K-FAC's; Martens &
    Grosse 2015), and that of gradients over examples, Σ_i G_i G_iᵀ = Σ_i Σ_st (x_s·x_t) g_s g_tᵀ (Shampoo's; Gupta et
    al. 2018), weighed so that their traces are equal in the first batch. The second is what coordinates of whole
    gradients ask for, but has one term an example; the first, with one a position, steadies it where examples are few.
    """

    def __init__(self) -> None:
        self._sides: tuple[Tensor, Tensor] | None = None
        self._weights = [0.0, 0.0]

    def sides(self) -> tuple[Tensor, Tensor] | None:
        """``[out, out]`` and ``[in, in]``; None before the first gradient."""
        return self._sides

    def add(self, out_factor: Tensor, in_factor: Tensor) -> None:
        """Positions of a batch, ``[n, s, d]`` each."""
        by_position, by_example = (_product(out_factor), _product(in_factor)), _by_example(out_factor, in_factor)
        if not all(self._weights):  # until a batch has a gradient there
            self._weights = [_ratio(one, other) for one, other in zip(by_position, by_example)]
        out, into = (one.add_(other, alpha=w) for one, other, w in zip(by_position, by_example, self._weights))
        self._sum(out, into)

    def add_formed(self, gradient: Tensor) -> None:
        """Gradients ``[n, out, in]``, all there is where a normaliser scales every entry."""
        self._sum(_product(gradient.mT), _product(gradient))

    def add_vectors(self, gradient: Tensor) -> None:
        """A vector layer's gradient ``[n, d]`` is its own only factor."""
        self._sum(gradient.T @ gradient, gradient.new_ones(1, 1))

    def _sum(self, out: Tensor, into: Tensor) -> None:
        self._sides = (out, into) if self._sides is None else (self._sides[0].add_(out), self._sides[1].add_(into))


def _by_example(out_factor: Tensor, in_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Σ G Gᵀ and Σ Gᵀ G over the examples of a batch, by products of pairs of positions where those are fewer."""
    s, out, into = out_factor.shape[1], out_factor.shape[2], in_factor.shape[2]
    if 2 * s * s * (out + into) + s * (out**2 + into**2) < s * out * into + out * into * (out + into):
        pairs = out_factor @ out_factor.mT, in_factor @ in_factor.mT  # [n, s, s]
        return _product(out_factor, pairs[1] @ out_factor), _product(in_factor, pairs[0] @ in_factor)
    sides = out_factor.new_zeros(out, out), out_factor.new_zeros(into, into)
    step = max(1, FORMED // (out * into))
    for left, right in zip(out_factor.split(step), in_factor.split(step)):
        gradient = left.mT @ right
        sides[0].add_(_product(gradient.mT))
        sides[1].add_(_product(gradient))
    return sides


@dataclass
class _Corner:
    """Second moments of the leading coordinates of one module."""

    out_basis: Tensor
    in_basis: Tensor
    moments: Tensor = field(init=False)
    examples: int = 0

    def __post_init__(self) -> None:
        self.moments = self.out_basis.new_zeros(self.out_basis.shape[1], self.in_basis.shape[1])

    def add(self, out_factor: Tensor, in_factor: Tensor) -> None:
        left, right = out_factor @ self.out_basis, in_factor @ self.in_basis
        self.moments += (left.mT @ right).square_().sum(0)
        self.examples += len(out_factor)

    def add_formed(self, gradient: Tensor) -> None:
        self.moments += (self.out_basis.T @ gradient @ self.in_basis).square_().sum(0)
        self.examples += len(gradient)

    def add_vectors(self, gradient: Tensor) -> None:
        self.moments += (gradient @ self.out_basis).square_().sum(0)[:, None]
        self.examples += len(gradient)

    def keep(self, floats: int) -> ModuleBasis:
        """The ``floats`` largest, with no more of either basis than they use.

        A corner of a few rows more than needed may not hold as many; then a module keeps what there is.
        """
        flat = self.moments.flatten()
        pairs = flat.argsort(descending=True, stable=True)[: min(floats, flat.numel())]
        columns = self.moments.shape[1]
        rows, used = int((pairs // columns).max()) + 1, int((pairs % columns).max()) + 1
        return ModuleBasis(
            self.out_basis[:, :rows].contiguous().cpu(),
            self.in_basis[:, :used].contiguous().cpu(),
            (pairs // columns * used + pairs % columns).cpu(),
            (flat[pairs] / max(self.examples, 1)).cpu(),
        )


def _shared(corners: dict[str, _Corner], total: int) -> dict[str, int]:
    """How many coordinates of each module are among the ``total`` largest of all; at least 2 each."""
    every = torch.cat([each.moments.flatten().cpu() / max(each.examples, 1) for each in corners.values()])
    owner = torch.cat([torch.full((c.moments.numel(),), i) for i, c in enumerate(corners.values())])
    chosen = owner[every.argsort(descending=True, stable=True)[:total]]
    counts = torch.bincount(chosen, minlength=len(corners)).tolist()
    return {name: min(max(2, count), corners[name].moments.numel()) for name, count in zip(corners, counts)}


def _ratio(one: Tensor, other: Tensor) -> float:
    trace = other.trace().item()
    return one.trace().item() / trace if trace > 0 else 0.0


def _product(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Σ over examples and positions of the outer products of two factors, or of one with itself."""
    flat = left.flatten(0, 1)
    return flat.T @ (flat if right is None else right.flatten(0, 1))


def _accumulating(
    model: nn.Module,
    plan: CapturePlan,
    sums: Mapping[str, _Factors | _Corner],
    outside: Mapping[str, nn.Module] | None,
) -> AbstractContextManager[Any]:
    def add(gradient: ModuleGradient) -> None:
        found = sums[gradient.name]
        if gradient.into is None:
            found.add_vectors(gradient.dense().flatten(1))
        elif isinstance(gradient.out, Tensor):
            found.add(gradient.out.float(), gradient.into.float())
        else:  # formed, for a normaliser that scales every entry
            found.add_formed(gradient.dense())

    return GradientCollector(model, replace(plan, sketch=Identity()), factors=add, outside=outside)
