"""Spectral sketch: the coordinates of a gradient, in the eigenbases of its factors' covariances, that matter most.

With Q_S, Q_A the eigenvectors of Σ g gᵀ and Σ x xᵀ over a sample (the Kronecker eigenbasis of George et al. 2018,
"Fast approximate natural gradient descent in a Kronecker-factored eigenbasis"), the entries of Q_Sᵀ G Q_A with the
largest second moment λ are kept: of all sets of as many coordinates in that basis, these keep most of the sample's
squared norm. They lie in a corner of few rows and columns, so a token costs 2 · r · (in + out) flops, as a two-sided
sketch does. `fit_spectral` makes one. The λ stay with the basis: dividing by them is EK-FAC in these coordinates.
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
from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch
from gradcore.sketches.identity import BoundWhole
from gradcore.sketches.tensor import TensorSketch


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
            found.update(tensor.contiguous().numpy().tobytes())
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
        basis: the tensors. Not part of a saved plan: :meth:`with_basis` attaches them again.
    """

    floats: int = 256
    digest: str = ""
    budgets: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    basis: SpectralBasis | None = field(default=None, compare=False, repr=False)
    kind: ClassVar[str] = "spectral"

    def __post_init__(self) -> None:
        if self.floats < 2:
            raise GradCoreError(f"a spectral sketch keeps at least 2 floats a module, not {self.floats}")
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
        return Spectral(self.floats, self.digest, self.budgets, self.seed, basis)

    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """``(min(budget, out · in),)``."""
        return (min(dict(self.budgets).get(name, self.floats), out_features * in_features),)

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
        if (len(found.out_basis), len(found.in_basis), len(found.pairs)) != (out_features, in_features, floats):
            raise GradCoreError(
                f"the basis of {name} is for [{len(found.out_basis)}, {len(found.in_basis)}] and {len(found.pairs)} "
                f"floats, the module is [{out_features}, {in_features}] and the plan keeps {floats}"
            )
        return _BoundSpectral(found.out_basis.to(device), found.in_basis.to(device), found.pairs.to(device))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, which the digest names."""
        return {
            "kind": self.kind,
            "floats": self.floats,
            "digest": self.digest,
            "budgets": [list(each) for each in self.budgets],
            "seed": self.seed,
        }


class _BoundSpectral(BoundSketch):
    """Project both factors, sum over positions, keep the chosen entries."""

    def __init__(self, out_basis: Tensor, in_basis: Tensor, pairs: Tensor) -> None:
        self._out, self._in, self._pairs = out_basis, in_basis, pairs

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


def _rotated(factor: Factor, basis: Tensor) -> Tensor:
    if isinstance(factor, OneHot):
        return factor.rows_of(basis)
    return factor @ basis.to(factor.dtype)
