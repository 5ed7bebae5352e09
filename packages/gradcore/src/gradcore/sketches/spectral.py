"""Spectral sketch: the coordinates of a gradient, in a Kronecker eigenbasis fitted to a sample, that matter most.

Q_S and Q_A are eigenvectors of K-FAC's and Shampoo's factors, weighed to equal traces: Σ g gᵀ + Σ G Gᵀ on the output
side, Σ x xᵀ + Σ Gᵀ G on the input side (George et al. 2018, "Fast approximate natural gradient descent in a
Kronecker-factored eigenbasis"; Gupta et al. 2018, "Shampoo"). The entries of Q_Sᵀ G Q_A with the largest second moment
λ are kept: of all sets of as many coordinates in that basis, these keep most of the sample's squared norm. They lie in
a corner of few rows and columns, so a token costs 2 · r · (in + out) flops, as a two-sided sketch does. `fit_spectral`
makes one. The λ stay with the basis: dividing by them is what EK-FAC and eigenvalue-corrected Shampoo do in theirs.

What the basis leaves out is lost, and with it what sets one text apart from all others. ``residual`` floats keep a
tensor sketch of it: with P the projection on the kept coordinates, ⟨PG, PH⟩ + ⟨sketch(G − PG), sketch(H − PH)⟩ is an
unbiased estimate of ⟨G, H⟩, and only the second, smaller part is noisy. G − PG is never formed: a sketch is linear, so
sketch(PG) is a small matrix times the kept coordinates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._factors import Factor, OneHot
from gradcore._tensor_bytes import tensor_bytes
from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch
from gradcore.sketches.identity import BoundWhole
from gradcore.sketches.tensor import TensorSketch, bound_tensor_sketch


@dataclass(frozen=True)
class ModuleBasis:
    """What is kept of one module.

    Attributes:
        out_basis, in_basis: ``[out, r]`` and ``[in, q]`` with orthonormal columns.
        pairs: ``[k]`` which entries of the ``[r, q]`` corner are kept, flattened, the largest moment first.
        moments: ``[k]`` mean square of each on the sample.
    """

    out_basis: Tensor
    in_basis: Tensor
    pairs: Tensor
    moments: Tensor


class SpectralBasis:
    """Bases by module; its digest names it in a plan, so gradients in different bases are never compared.

    >>> SpectralBasis({}).digest[:8]
    'e3b0c442'
    """

    def __init__(self, modules: Mapping[str, ModuleBasis]) -> None:
        self.modules = dict(modules)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and bytes."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor_bytes(tensor))
        return found.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Flat, for a file: ``name.out_basis`` … on the CPU."""
        return {
            f"{name}.{part}": getattr(basis, part).detach().cpu().contiguous()
            for name, basis in self.modules.items()
            for part in ("out_basis", "in_basis", "pairs", "moments")
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SpectralBasis:
        """What :meth:`tensors` gave."""
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        parts = ("out_basis", "in_basis", "pairs", "moments")
        try:
            return cls({name: ModuleBasis(*(tensors[f"{name}.{part}"] for part in parts)) for name in names})
        except KeyError as missing:
            raise GradCoreError(f"not a spectral basis: {missing} is missing") from None


@register_sketch
@dataclass(frozen=True)
class Spectral(Sketch):
    """The leading coordinates in a fitted basis. Modules that the basis lacks are tensor-sketched to ``floats``.

    >>> Spectral(floats=256, digest="…").shape(4096, 1024)
    (256,)

    Args:
        floats: kept a module.
        digest: of the basis.
        budgets: (module, floats) where modules share a total by λ; others keep ``floats``.
        seed: of the tensor sketch of modules without a basis (lookup tables, whose covariance is a list of counts).
        residual: floats a module for a tensor sketch of what its basis leaves out.
        basis: the tensors. Not part of a saved plan: :meth:`with_basis` attaches them again.
    """

    floats: int = 256
    digest: str = ""
    budgets: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    residual: int = 0
    basis: SpectralBasis | None = field(default=None, compare=False, repr=False)
    kind: ClassVar[str] = "spectral"

    def __post_init__(self) -> None:
        if self.floats < 2:
            raise GradCoreError(f"a spectral sketch keeps at least 2 floats a module, not {self.floats}")
        if self.residual < 0 or (self.residual and not self.budgets):
            raise GradCoreError("a residual is sketched beside the budgets of a fitted basis: residual=0 without them")
        object.__setattr__(self, "budgets", tuple((str(name), int(count)) for name, count in self.budgets))

    def with_basis(self, basis: SpectralBasis) -> Spectral:
        """The same sketch, able to bind.

        Raises:
            GradCoreError: it is another basis than the plan was made with.
        """
        if basis.digest != self.digest:
            raise GradCoreError(
                f"the plan was made with spectral basis {self.digest[:12]}, this is {basis.digest[:12]}: "
                "gradients in different bases cannot be compared"
            )
        return Spectral(self.floats, self.digest, self.budgets, self.seed, self.residual, basis)

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(min(budget, out · in) + residual,)``, the residual no larger than what there is."""
        whole, budgets = out_features * in_features, dict(self.budgets)
        lead = min(budgets.get(name, self.floats), whole)
        return (lead + (self._rest(lead, whole) if name in budgets else 0),)

    def _rest(self, lead: int, whole: int) -> int:
        rest = min(self.residual, whole - lead)
        return rest if rest > 1 else 0

    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """Both bases on the device.

        Raises:
            GradCoreError: no basis is attached, or it is of another shape.
        """
        if self.basis is None:
            raise GradCoreError(
                "a spectral sketch needs its basis: fit one with fit_spectral, or attach the saved one (with_basis)"
            )
        (floats,) = self.shape(out_features, in_features, elementwise, name=name)
        found = self.basis.modules.get(name)
        if found is None:
            if floats == out_features * in_features:
                return BoundWhole()
            return TensorSketch(floats, self.seed).bind(name, out_features, in_features, device, elementwise)
        lead = len(found.pairs)
        rest = self._rest(lead, out_features * in_features)
        sides = (out_features * in_features, 1) if elementwise else (out_features, in_features)
        if (len(found.out_basis), len(found.in_basis), lead + rest) != (*sides, floats):
            raise GradCoreError(
                f"the basis of {name} is for [{len(found.out_basis)}, {len(found.in_basis)}] and {len(found.pairs)} "
                f"floats, the module is [{out_features}, {in_features}] and the plan keeps {floats}"
            )
        leading = _BoundSpectral(found.out_basis.to(device), found.in_basis.to(device), found.pairs.to(device))
        if not rest:
            return leading
        identity = (name, "residual")
        tail = bound_tensor_sketch(identity, out_features, in_features, rest, self.seed, device, elementwise)
        return _BoundResidual(leading, tail, leading.sketched_by(tail, out_features if elementwise else 0))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, which the digest names."""
        return {
            "kind": self.kind,
            "floats": self.floats,
            "digest": self.digest,
            "budgets": [list(each) for each in self.budgets],
            "seed": self.seed,
            "residual": self.residual,
        }


class _BoundSpectral(BoundSketch):
    """Project both factors, sum over positions, keep the chosen entries."""

    def __init__(self, out_basis: Tensor, in_basis: Tensor, pairs: Tensor) -> None:
        self._out, self._in, self._pairs = out_basis, in_basis, pairs

    @property
    def sides(self) -> tuple[int, int]:
        """Columns of either basis."""
        return self._out.shape[1], self._in.shape[1]

    def sketched_by(self, other: BoundSketch, vector: int) -> Tensor:
        """The other sketch of each kept coordinate's own gradient u vᵀ, ``[k, floats]``.

        ``vector`` is the width of a vector layer, whose gradient is u alone, and 0 for a matrix.
        """
        columns = self._in.shape[1]
        left = self._out[:, self._pairs // columns].T  # [k, out]
        if vector:
            return other.vector(left.unflatten(1, (vector, -1)))
        right = self._in[:, self._pairs % columns].T
        return other.combine(other.project_out(left[:, None]), other.project_in(right[:, None]))

    def project_out(self, factor: Factor) -> Factor:
        return _rotated(factor, self._out)

    def project_in(self, factor: Factor) -> Factor:
        return _rotated(factor, self._in)

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        assert isinstance(out_factor, Tensor)
        assert isinstance(in_factor, Tensor)
        corner = out_factor.float().mT @ in_factor.float()
        return corner.flatten(1).index_select(1, self._pairs)

    def vector(self, gradient: Tensor) -> Tensor:
        """A vector layer's gradient ``[n, out, in]`` is one factor, flat, against a second of width 1."""
        return (gradient.flatten(1).float() @ self._out).index_select(1, self._pairs)


class _BoundResidual(BoundSketch):
    """The kept coordinates c, and beside them sketch(G) − sketch(PG) = sketch(G) − c · sketched."""

    def __init__(self, leading: _BoundSpectral, tail: BoundSketch, sketched: Tensor) -> None:
        self._leading, self._tail, self._sketched = leading, tail, sketched

    def project_out(self, factor: Factor) -> Factor:
        return _beside(self._leading.project_out(factor), self._tail.project_out(factor))

    def project_in(self, factor: Factor) -> Factor:
        return _beside(self._leading.project_in(factor), self._tail.project_in(factor))

    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        assert isinstance(out_factor, Tensor)
        assert isinstance(in_factor, Tensor)
        rows, columns = self._leading.sides
        kept = self._leading.combine(out_factor[..., :rows], in_factor[..., :columns])
        return self._with_tail(kept, self._tail.combine(out_factor[..., rows:], in_factor[..., columns:]))

    def matrix(self, gradient: Tensor) -> Tensor:
        """Each part takes it in its own way."""
        return self._with_tail(self._leading.matrix(gradient), self._tail.matrix(gradient))

    def vector(self, gradient: Tensor) -> Tensor:
        return self._with_tail(self._leading.vector(gradient), self._tail.vector(gradient))

    def _with_tail(self, kept: Tensor, tail: Tensor) -> Tensor:
        return torch.cat((kept, tail.addmm(kept, self._sketched, alpha=-1)), dim=1)


def _beside(first: Factor, second: Factor) -> Tensor:
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    return torch.cat((first, second), dim=-1)


def _rotated(factor: Factor, basis: Tensor) -> Tensor:
    if isinstance(factor, OneHot):
        return factor.rows_of(basis)
    return factor @ basis.to(factor.dtype)
