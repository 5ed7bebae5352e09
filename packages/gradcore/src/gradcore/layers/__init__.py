"""The layer registry: one small file per layer type, found by the type of a module.

A layer says how a module's per-example gradient is a sum over positions of outer products, ``G_n = Σ_s g_ns a_nsᵀ``
(docs/add-a-layer.md). Importing a file here registers it; nothing else needs an edit.
"""

from gradcore.layers import hf_conv1d, linear
from gradcore.layers._registry import Layer, layer_for, register_layer

__all__ = ["Layer", "hf_conv1d", "layer_for", "linear", "register_layer"]
