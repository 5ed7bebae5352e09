"""Per-example gradients of any torch model, by hooks, at the cost of a forward and an activation-backward pass."""

from gradcore._addressing import select_modules
from gradcore._attention import attention_heads
from gradcore._collector import GradientCollector, not_collecting
from gradcore._coverage import Coverage, coverage
from gradcore._errors import CaptureError, GradCoreError, PlanMismatch, SelectionError
from gradcore._fidelity import Fidelity, fidelity, gram_fidelity
from gradcore._fingerprint import model_fingerprint
from gradcore._fit_spectral import fit_spectral, with_residual
from gradcore._loss import IGNORE, per_example_loss
from gradcore._losses import Loss
from gradcore._module_gradient import ModuleGradient
from gradcore._module_plan import AttentionConfig, ModulePlan
from gradcore._plan import MATRICES, CapturePlan
from gradcore._product_costs import product_costs
from gradcore._share_floats import energies, share_floats
from gradcore.normalizers import Normalizer, normalizer_kinds, optimizer_moments
from gradcore.sketches import (
    Budgeted,
    Dense,
    GlobalSketch,
    Identity,
    ModuleBasis,
    Sketch,
    SparseJL,
    Spectral,
    SpectralBasis,
    TensorSketch,
    TwoSided,
)

__all__ = [
    "AttentionConfig",
    "Budgeted",
    "CaptureError",
    "CapturePlan",
    "Coverage",
    "Dense",
    "Fidelity",
    "GlobalSketch",
    "GradCoreError",
    "GradientCollector",
    "IGNORE",
    "Identity",
    "Loss",
    "MATRICES",
    "ModuleBasis",
    "ModuleGradient",
    "ModulePlan",
    "Normalizer",
    "PlanMismatch",
    "SelectionError",
    "Sketch",
    "SparseJL",
    "Spectral",
    "SpectralBasis",
    "TensorSketch",
    "TwoSided",
    "attention_heads",
    "coverage",
    "energies",
    "fidelity",
    "fit_spectral",
    "gram_fidelity",
    "model_fingerprint",
    "normalizer_kinds",
    "not_collecting",
    "optimizer_moments",
    "per_example_loss",
    "product_costs",
    "select_modules",
    "share_floats",
    "with_residual",
]
