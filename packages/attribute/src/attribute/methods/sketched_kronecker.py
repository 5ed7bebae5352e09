"""EK-FAC on the coordinates that matter most: rows become short vectors, which answer any number of queries.

In the eigenbasis of a Kronecker curvature the Fisher is about diagonal (George et al. 2018), so EK-FAC's influence is
Σ φ_q φ_i / (λ + d) over coordinates φ of the gradients there, with d the module's damping. Kept are side² coordinates a
module, on average: those whose λ are largest among all modules'. That is a spectral sketch in the curvature's basis.
What is left out, where H⁻¹ is largest and gradients are smallest, is lost.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from attribute.curvature import Inversion, Kronecker
from attribute.engine import gradients_of
from attribute.methods._estimator import FISHER, GRADIENTS, Estimator, register_estimator
from attribute.methods._study import Study
from gradcore import CapturePlan, ModuleBasis, Spectral, SpectralBasis

LEAST = 2
"""Coordinates that every module keeps."""


@register_estimator
class SketchedEkfac(Estimator):
    """EK-FAC in its leading coordinates."""

    name: ClassVar[str] = "ek-fac-sketched"
    needs: ClassVar[str] = "factors over the rows (fitted); side² floats a module, on average"
    uses: ClassVar[frozenset[str]] = GRADIENTS | FISHER | {"projection_dim", "damping"}
    cost: ClassVar[str] = "3 passes"
    source: ClassVar[str] = "George et al. 2018; Grosse et al. 2023, section 2"

    def influence(self, study: Study) -> np.ndarray:
        """Σ φ_q φ_i / (λ + d)."""
        curvature = study.curvature("ekfac")
        plan = leading_coordinates(curvature, study.projection_dim**2 * len(study.plan.modules))
        assert isinstance(plan.sketch, Spectral)
        assert plan.sketch.basis is not None
        queries = gradients_of(study.model, study.queries, plan, study.budget)
        for name, columns in plan.slices.items():
            mean = curvature.modules[name].eigenvalues.mean().item()
            damping = Inversion("absolute", study.damping * mean)
            queries[:, columns] *= damping.of(plan.sketch.basis.modules[name].moments).float().numpy()
        return queries @ gradients_of(study.model, study.rows, plan, study.budget).T


def leading_coordinates(curvature: Kronecker, total: int) -> CapturePlan:
    """The curvature's plan with a spectral sketch of ``total`` coordinates, those of any module with the largest λ."""
    every = torch.cat([module.eigenvalues.flatten() for module in curvature.modules.values()])
    least = every.topk(min(total, len(every))).values[-1]
    modules = dict[str, ModuleBasis]()
    for each in curvature.plan.modules:
        module = curvature.modules[each.name]
        values = module.eigenvalues.flatten()
        chosen = values.topk(max(min(LEAST, len(values)), int((values >= least).sum()))).indices
        if each.elementwise:
            sides, where = (_columns(None, len(values), chosen), torch.ones(1, 1)), torch.arange(len(chosen))
        else:
            rows, row = (chosen // each.in_features).unique(return_inverse=True)
            columns, column = (chosen % each.in_features).unique(return_inverse=True)
            sides = (
                _columns(module.out_vectors, each.out_features, rows),
                _columns(module.in_vectors, each.in_features, columns),
            )
            where = row * len(columns) + column
        modules[each.name] = ModuleBasis(*sides, where, values[chosen])
    basis = SpectralBasis(modules)
    budgets = tuple((name, len(found.pairs)) for name, found in modules.items())
    return replace(curvature.plan, sketch=Spectral(digest=basis.digest, budgets=budgets, basis=basis))


def _columns(vectors: Tensor | None, width: int, chosen: Tensor) -> Tensor:
    """Some eigenvectors; of a diagonal factor they are unit vectors."""
    if vectors is not None:
        return vectors[:, chosen].float()
    found = torch.zeros(width, len(chosen))
    found[chosen, torch.arange(len(chosen))] = 1.0
    return found
