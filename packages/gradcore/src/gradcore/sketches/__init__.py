"""Sketches: how a module's per-example gradient becomes the floats that are kept. One file a kind."""

from gradcore.sketches._budgets import Budgeted
from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch, sketch_from_dict
from gradcore.sketches.dense import Dense
from gradcore.sketches.identity import Identity
from gradcore.sketches.sparse import SparseJL
from gradcore.sketches.spectral import ModuleBasis, Spectral, SpectralBasis
from gradcore.sketches.summed import GlobalSketch
from gradcore.sketches.tensor import TensorSketch
from gradcore.sketches.two_sided import TwoSided

__all__ = [
    "BoundSketch",
    "Budgeted",
    "Dense",
    "GlobalSketch",
    "Identity",
    "ModuleBasis",
    "Sketch",
    "SparseJL",
    "Spectral",
    "SpectralBasis",
    "TensorSketch",
    "TwoSided",
    "register_sketch",
    "sketch_from_dict",
]
