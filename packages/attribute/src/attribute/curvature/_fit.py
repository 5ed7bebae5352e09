"""Fitting Kronecker factors: one pass for the factors, one more for corrected eigenvalues.

Per token, with a the input and g the gradient of the output of a module, and per row G = Σ_tokens g aᵀ:

=============  ============================  ===================================  ==================
K-FAC          out = E_t[g gᵀ]               in = E_t[a aᵀ]                       scale = tokens a row
TK-FAC         out = E_t[‖a‖² g gᵀ]          in = E_t[‖g‖² a aᵀ]                  / E_t[‖a‖²‖g‖²]
Shampoo        out = E_row[G Gᵀ]             in = E_row[Gᵀ G]                     / E_row[‖G‖²]
=============  ============================  ===================================  ==================

The scale makes the trace of the product that of the Fisher of a row (Martens & Grosse 2015; Gao et al. 2021, theorem
3.1; Morwani et al. 2024, section 3.1). All are means over tokens or rows, so the batches do not matter. The correction
is Λ = E_row[(Q_Gᵀ G Q_A)²] (George et al. 2018, section 3). A table over the vocabulary, looked up, multiplied with or
both, has a diagonal out factor; a vector layer has no factors, and keeps E_row[G²].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError
from attribute.curvature._factors import Factors, factor_pass, rows_with_loss
from attribute.curvature._kronecker import Kronecker, KroneckerModule
from attribute.data import TokenFile
from attribute.model import LanguageModel
from attribute.processes import Processes, current
from attribute.progress import Progress, Quiet
from gradcore import CapturePlan, ModulePlan

WIDEST = 16_384
"""Features of an out side, above which its factor is kept as its diagonal."""
METHODS = ("kfac", "ekfac", "tkfac", "shampoo", "ev-shampoo")
_CORRECTED = {"ekfac": "kfac", "ev-shampoo": "shampoo"}
_FORMED_FLOATS = 1 << 22  # gradients [n, out, in] formed at a time, in floats


def fit_kronecker(
    model: LanguageModel,
    tokens: TokenFile,
    plan: CapturePlan,
    method: str = "ekfac",
    *,
    labels: str = "sampled",
    seed: int = 0,
    sample: int = 0,
    partitions: int = 1,
    budget: int = 4096,
    progress: Progress | None = None,
) -> Kronecker:
    """Fit the curvature of the planned modules.

    Args:
        model, tokens, plan: as for :func:`attribute.engine.run_pass`. A two-sided sketch gives the curvature of the
            sketched sides (sketched EK-FAC): r² + r² + r² floats a module instead of O² + I² + OI.
        method: one of :data:`METHODS`.
        labels: ``sampled`` (true Fisher, where the rows' weights have no part) or ``dataset`` (empirical Fisher).
        seed: of the sampled labels.
        sample: at most so many rows, evenly spaced; 0 takes all.
        partitions: fit the modules in so many groups, each by passes of its own, so that only a group's factors are
            in memory while fitting.
        budget: padded tokens a batch.
        progress: told of each pass.

    Several processes share rows and decompositions, and all come to the same curvature.
    """
    if method not in METHODS:
        raise AttributionError(f"--method must be one of {', '.join(METHODS)}, not {method!r}")
    if not 1 <= partitions <= len(plan.modules):
        raise AttributionError(f"--module-partitions must be 1 to {len(plan.modules)} (modules), not {partitions}")
    progress = progress or Quiet()
    if labels == "sampled" and tokens.weights is not None:
        progress.note("the labels of the Fisher are sampled from the model: it knows no rewards (dataset labels do)")
    rows = rows_with_loss(tokens, sample)
    base = _CORRECTED.get(method, method)
    here = current()
    found = dict[str, KroneckerModule]()

    def sweep(part: CapturePlan, label: str, sums: Mapping[str, _Moments | _Correction]) -> None:
        progress.start(label, int(tokens.lengths[rows].sum()), "tokens")
        factor_pass(
            model,
            tokens,
            _with_first(part, plan),
            rows,
            lambda factors: sums[factors.name].add(factors) if factors.name in sums else None,
            lambda name, gradient: sums[name].add_vector(gradient) if name in sums else None,
            labels=labels,
            seed=seed,
            budget=budget,
            progress=progress,
        )
        progress.stop()
        share(list(sums.values()), here)

    for number in range(partitions):
        part = replace(plan, modules=plan.modules[number::partitions])
        label = f" {number + 1}/{partitions}" if partitions > 1 else ""
        moments = {each.name: _Moments(base, part.shapes[each.name], _is_table(each)) for each in part.modules}
        sweep(part, f"factors{label}", moments)
        # Each decomposed once: eigenvectors of others would be other, equally good ones.
        mine = here.deal([sum(each * each * each for each in part.shapes[name][:2]) for name in moments])
        modules = here.merged(
            {name: moments[name].finish(len(rows)) for name in (list(moments)[place] for place in mine)}
        )
        matrices = {name: each for name, each in modules.items() if each.out_values is not None}
        if method in _CORRECTED and matrices:
            second = {name: _Correction(each, part.shapes[name]) for name, each in matrices.items()}
            kept = tuple(each for each in part.modules if each.name in matrices)
            sweep(replace(part, modules=kept), f"eigenvalues{label}", second)
            modules |= {name: each.finish(len(rows)) for name, each in second.items()}
        found |= modules
    return Kronecker(plan, method, labels, len(rows), {each.name: found[each.name] for each in plan.modules})


def _is_table(planned: ModulePlan) -> bool:
    """Over a vocabulary: out factors of that size have no eigenvectors within reach."""
    return planned.kind == "embedding" or bool(planned.tied) or planned.out_features > WIDEST


def _with_first(part: CapturePlan, whole: CapturePlan) -> CapturePlan:
    """The part and the first module of the whole: it tells how many rows a batch has, which a position table, looked up
    once for all of them, does not."""
    first = whole.modules[0]
    return part if first in part.modules else replace(part, modules=(first, *part.modules))


def share(sums: Sequence[_Moments | _Correction], here: Processes) -> None:
    """Add what the other processes of the run have of the same modules."""
    if here.world == 1:
        return
    parts = [part for each in sums for part in each.parts()]
    found = iter(here.sums(parts))
    for each in sums:
        each.take([next(found) for _ in each.parts()])


@dataclass
class _Moments:
    """Sums of one module over a pass, in float64."""

    method: str
    shape: tuple[int, ...]
    diagonal: bool = False
    out: Tensor | None = None
    given: Tensor | None = None
    squares: Tensor | None = None
    mass: float = 0.0
    tokens: int = 0
    dtype: torch.dtype = torch.float32

    def add(self, factors: Factors) -> None:
        self.dtype = factors.given.dtype
        if self.method == "shampoo":
            for block in _gradients(factors, self.shape):
                squared = block.square()
                out = squared.sum((0, 2)) if self.diagonal else torch.einsum("noi,npi->op", block, block)
                self._sum(out, torch.einsum("noi,noj->ij", block, block))
                self.mass += squared.sum(dtype=torch.float64).item()
            return
        out, given = factors.flat_out(), factors.flat_given()
        self.tokens += len(given)
        out_mass = given_mass = None
        if self.method == "tkfac":
            given_mass = given.square().sum(1, keepdim=True)
            out_mass = torch.ones_like(given_mass) if factors.looked_up else out.square().sum(1, keepdim=True)
            self.mass += (given_mass * out_mass).sum(dtype=torch.float64).item()
        if factors.looked_up:
            out = self._counts(out, given_mass)
        elif self.diagonal:
            squares = out.square()
            out = (squares if given_mass is None else squares.mul_(given_mass)).sum(0)
        else:
            out = _product(out, given_mass)
        self._sum(out, _product(given, out_mass))

    def add_vector(self, gradient: Tensor) -> None:
        squares = gradient.double().square().sum(0)
        self.squares = squares if self.squares is None else self.squares + squares

    def finish(self, rows: int) -> KroneckerModule:
        if self.squares is not None:
            shape = self.shape if len(self.shape) == 2 else (self.squares.numel(), 1)
            return KroneckerModule(None, None, None, None, (self.squares / rows).reshape(shape).float().cpu())
        if self.out is None or self.given is None:  # no gradient ever came
            flat = torch.zeros(self.shape)
            return KroneckerModule(None, None, None, None, flat)
        if self.method == "kfac":
            count, scale = self.tokens, self.tokens / rows
        elif self.method == "tkfac":
            count, scale = self.tokens, self.tokens / rows / (self.mass / self.tokens or 1.0)
        else:
            count, scale = rows, 1 / (self.mass / rows or 1.0)
        out_values, out_vectors = _decompose(self.out / count, self.dtype)
        in_values, in_vectors = _decompose(self.given / count, self.dtype)
        return KroneckerModule(out_values, out_vectors, in_values, in_vectors, None, scale)

    def parts(self) -> list[Tensor | None]:
        """All that is summed; which float type came is told by a count of those that are wide."""
        wide = float(self.dtype == torch.float64)
        numbers = torch.tensor([self.mass, float(self.tokens), wide], dtype=torch.float64)
        return [self.out, self.given, self.squares, numbers]

    def take(self, parts: Sequence[Tensor | None]) -> None:
        """The sums over all processes instead."""
        self.out, self.given, self.squares, numbers = parts
        assert numbers is not None
        self.mass, self.tokens = numbers[0].item(), int(numbers[1])
        self.dtype = torch.float64 if numbers[2] else torch.float32

    def _sum(self, out: Tensor, given: Tensor) -> None:
        self.out = out.double() if self.out is None else self.out.add_(out)
        self.given = given.double() if self.given is None else self.given.add_(given)

    def _counts(self, ids: Tensor, mass: Tensor | None) -> Tensor:
        weights = torch.ones(len(ids), device=ids.device) if mass is None else mass[:, 0]
        kept = ids >= 0
        return torch.zeros(self.shape[0], device=ids.device).index_add_(0, ids[kept], weights[kept])


@dataclass
class _Correction:
    """Σ_rows (Q_Gᵀ G Q_A)² of one module."""

    module: KroneckerModule
    shape: tuple[int, ...]
    total: Tensor | None = None
    dtype: torch.dtype = torch.float32

    def add(self, factors: Factors) -> None:
        self.dtype = factors.given.dtype
        out, given = self.module.out_vectors, self.module.in_vectors
        # Tokens are rotated, not gradients: s (O² + I²) instead of O I (O + I) a row.
        rotated = replace(
            factors,
            out=factors.out if out is None else factors.out @ out.to(factors.out.device),
            given=factors.given if given is None else factors.given @ given.to(factors.given.device),
        )
        for block in _gradients(rotated, self.shape):
            squares = block.square_().sum(0)
            self.total = squares.double() if self.total is None else self.total.add_(squares)

    def add_vector(self, gradient: Tensor) -> None:
        raise AssertionError("vector layers have no factors to correct")

    def parts(self) -> list[Tensor | None]:
        """All that is summed."""
        return [self.total]

    def take(self, parts: Sequence[Tensor | None]) -> None:
        """The sums over all processes instead."""
        (self.total,) = parts
        self.dtype = self.module.in_values.dtype if self.module.in_values is not None else self.dtype

    def finish(self, rows: int) -> KroneckerModule:
        assert self.total is not None
        return replace(self.module, corrected=(self.total / rows).to(self.dtype).cpu())


def _gradients(factors: Factors, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Blocks ``[m, out, in]`` of the rows' gradients, small enough to stay in cache."""
    rows = max(1, _FORMED_FLOATS // int(np.prod(shape)))
    for start in range(0, len(factors.given), rows):
        given = factors.given[start : start + rows]
        out = factors.out[start : start + rows]
        yield replace(factors.table, ids=out).transposed_product(given) if factors.looked_up else out.mT @ given


def _product(tokens: Tensor, mass: Tensor | None) -> Tensor:
    return tokens.T @ (tokens if mass is None else tokens * mass)


def _decompose(moment: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and eigenvectors from a decomposition in float64; a diagonal is its own."""
    if not moment.isfinite().all():
        raise AttributionError("a Kronecker factor is not finite: the model overflows (--precision fp32?)")
    if moment.dim() == 1:
        return moment.to(dtype).cpu(), None
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return values.clamp(min=0).to(dtype).cpu(), vectors.to(dtype).cpu()
