"""The Fisher of a matrix layer as a Kronecker product, with its eigenvalues corrected or not.

F ≈ (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ, so H⁻¹G = Q_G [(Q_Gᵀ G Q_A) / (Λ + d)] Q_Aᵀ: two small rotations, an elementwise
product and two back, never an [OI, OI] matrix (George et al. 2018, "EK-FAC"; Grosse et al. 2023, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribute._errors import AttributionError, RunError
from attribute.curvature._gram import spectrum_of
from attribute.curvature._inversion import Inversion
from attribute.curvature._sidecar import save_tensors
from gradcore import CapturePlan


@dataclass(frozen=True)
class KroneckerModule:
    """One module's part.

    Attributes:
        out_values, in_values: spectra of the factors ``[out]`` and ``[in]``; ``None`` for a vector layer.
        out_vectors, in_vectors: eigenvectors in columns; ``None`` where the factor is diagonal.
        corrected: Λ ``[out, in]``, the second moments in the eigenbasis, if they were measured.
        scale: times the product of both spectra it is the mean Fisher of a row.
    """

    out_values: Tensor | None
    out_vectors: Tensor | None
    in_values: Tensor | None
    in_vectors: Tensor | None
    corrected: Tensor | None
    scale: float = 1.0

    @property
    def eigenvalues(self) -> Tensor:
        """Λ ``[out, in]`` of a row's Fisher."""
        if self.corrected is not None:
            return self.corrected
        assert self.out_values is not None
        assert self.in_values is not None
        return self.scale * self.out_values[:, None] * self.in_values[None]

    def multipliers(self, inversion: Inversion) -> Tensor:
        """What each entry in the eigenbasis is multiplied with, ``[out, in]`` float64."""
        if inversion.kind != "factored":
            return inversion.of(self.eigenvalues)
        if self.corrected is not None or self.out_values is None or self.in_values is None:
            return inversion.of(self.eigenvalues)  # refuses, with the reason
        return inversion.of_factors(self.scale * self.out_values, self.in_values)

    def rotate(self, gradients: Tensor, *, back: bool = False) -> Tensor:
        """``[n, out, in]`` into the eigenbasis, or back."""
        out, given = self.out_vectors, self.in_vectors
        if out is not None:
            gradients = (out if back else out.T).to(gradients.dtype) @ gradients
        if given is not None:
            gradients = gradients @ (given.T if back else given).to(gradients.dtype)
        return gradients


@dataclass(frozen=True)
class Kronecker:
    """A fitted K-FAC, EK-FAC, TK-FAC or Shampoo curvature.

    Example::

        curvature = load_curvature("runs/hessian")
        directions = curvature.apply(query_gradients, Inversion("damped", 0.1))   # [q, width]

    Attributes:
        plan: the modules and the sketch whose sides were factored.
        method: ``kfac``, ``ekfac``, ``tkfac``, ``shampoo`` or ``ev-shampoo``.
        labels: ``sampled`` or ``dataset``.
        rows: rows that were averaged over.
        modules: by name, in the plan's order.
    """

    plan: CapturePlan
    method: str
    labels: str
    rows: int
    modules: Mapping[str, KroneckerModule]

    def apply(self, gradients: np.ndarray | Tensor, inversion: Inversion | Mapping[str, Inversion]) -> np.ndarray:
        """Rows ``[n, width]`` times H⁻¹ (or H^-½); by one inversion, or by one for each module."""
        given = _floats(gradients)
        if given.shape[1] != self.plan.width:
            raise RunError(f"gradients have {given.shape[1]} columns, the curvature has {self.plan.width}")
        out = torch.empty_like(given)
        for name, module in self.modules.items():
            columns, shape = self.plan.slices[name], module.eigenvalues.shape
            how = inversion if isinstance(inversion, Inversion) else inversion[name]
            rotated = module.rotate(given[:, columns].reshape(len(given), *shape))
            rotated = rotated * module.multipliers(how).to(rotated.dtype)
            out[:, columns] = module.rotate(rotated, back=True).flatten(1)
        return out.numpy()

    def multiply(self, gradients: np.ndarray | Tensor) -> np.ndarray:
        """Rows ``[n, width]`` times H itself."""
        given = _floats(gradients)
        out = torch.empty_like(given)
        for name, module in self.modules.items():
            columns, values = self.plan.slices[name], module.eigenvalues.to(given.dtype)
            rotated = module.rotate(given[:, columns].reshape(len(given), *values.shape)) * values
            out[:, columns] = module.rotate(rotated, back=True).flatten(1)
        return out.numpy()

    def spectrum(self) -> dict[str, dict[str, float]]:
        """As for :meth:`Gram.spectrum`."""
        return {name: spectrum_of(module.eigenvalues) for name, module in self.modules.items()}

    def save(self, folder: str | Path, **provenance: Any) -> None:
        """Write the sidecar that :func:`load_curvature` reads."""
        tensors = dict[str, Tensor]()
        for name, module in self.modules.items():
            for part in _PARTS:
                if (tensor := getattr(module, part)) is not None:
                    tensors[f"{name}/{part}"] = tensor.float()
        about = {
            "plan": self.plan.to_dict(),
            "method": self.method,
            "labels": self.labels,
            "rows": self.rows,
            "scales": {name: module.scale for name, module in self.modules.items()},
            "spectrum": self.spectrum(),
        }
        save_tensors(folder, "kronecker", tensors, {**about, **provenance})

    @classmethod
    def from_saved(cls, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Kronecker:
        """What :meth:`save` wrote."""
        modules = {
            name: KroneckerModule(**{part: tensors.get(f"{name}/{part}") for part in _PARTS}, scale=scale)
            for name, scale in about["scales"].items()
        }
        return cls(CapturePlan.from_dict(about["plan"]), about["method"], about["labels"], about["rows"], modules)

    def require(self, *methods: str) -> None:
        """Raise unless it was fitted by one of these methods."""
        if self.method not in methods:
            raise AttributionError(
                f"this curvature is {self.method}, {' or '.join(methods)} is needed: "
                f"trace hessian --method {methods[0]}"
            )


def _floats(gradients: np.ndarray | Tensor) -> Tensor:
    """Double stays double, everything else is float32."""
    found = torch.as_tensor(gradients)
    return found if found.dtype == torch.float64 else found.float()


_PARTS = ("out_values", "out_vectors", "in_values", "in_vectors", "corrected")
