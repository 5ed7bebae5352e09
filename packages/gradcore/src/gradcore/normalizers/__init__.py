"""Second-moment normalisers of gradients, a file each; a new one is a file here and a line below."""

from gradcore.normalizers._bound import BoundNormalizer
from gradcore.normalizers._optimizer import optimizer_moments
from gradcore.normalizers._protocol import Normalizer, Scale, normalizer_kinds, register_normalizer
from gradcore.normalizers.adafactor import adafactor
from gradcore.normalizers.adam import adam
from gradcore.normalizers.shampoo import shampoo

__all__ = [
    "BoundNormalizer",
    "Normalizer",
    "Scale",
    "adafactor",
    "adam",
    "normalizer_kinds",
    "optimizer_moments",
    "register_normalizer",
    "shampoo",
]
