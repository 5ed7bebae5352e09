"""Second-moment normalisers of gradients, a file each; a new one is a file here and a line below."""

from gradcore.normalizers import adafactor, adam, shampoo  # noqa: F401 (they register themselves)
from gradcore.normalizers._bound import BoundNormalizer
from gradcore.normalizers._optimizer import optimizer_moments
from gradcore.normalizers._protocol import Normalizer, Scale, normalizer_kinds, register_normalizer

__all__ = ["BoundNormalizer", "Normalizer", "Scale", "normalizer_kinds", "optimizer_moments", "register_normalizer"]
