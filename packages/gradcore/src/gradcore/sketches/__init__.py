"""Sketches: how a module's per-example gradient becomes the floats that are kept. One file a kind."""

from gradcore.sketches._protocol import BoundSketch, Sketch, register_sketch, sketch_from_dict
from gradcore.sketches.identity import Identity
from gradcore.sketches.two_sided import TwoSided

__all__ = ["BoundSketch", "Identity", "Sketch", "TwoSided", "register_sketch", "sketch_from_dict"]
