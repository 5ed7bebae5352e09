"""The layer registry: one small file per layer type, found by the type of a module.

A layer says how the gradient of a module's parameters comes from what the forward pass knows and the gradient of its
output (docs/add-a-layer.md). Importing a file here registers it; nothing else needs an edit.
"""

from gradcore.layers import convolution, embedding, experts, hf_conv1d, linear, norm
from gradcore.layers._registry import Layer, has_bias, layer_for, register_layer

__all__ = [
    "Layer",
    "convolution",
    "embedding",
    "experts",
    "has_bias",
    "hf_conv1d",
    "layer_for",
    "linear",
    "norm",
    "register_layer",
]
