"""Activations: which latents are active and what their values become. One small file each, named as the activation."""

from sparsify.activations._base import Activation, Batch, activation_named

__all__ = ["Activation", "Batch", "activation_named"]
