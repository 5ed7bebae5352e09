"""What a layer type must say, and the table of those that have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """How one type of module yields the factors of its per-example weight gradient.

    Attributes:
        kind: the name saved in plans, such as ``"linear"``.
        matches: whether a module is of this type.
        shape: ``(out, in)`` of the weight gradient, whatever the storage order of the weight.
        activation: module and its input ``[n, ..., in]`` to the right factor ``[n, s, in]``.
        output_gradient: module and the gradient of its output to the left factor ``[n, s, out]``.
        weight: name of the parameter that is covered.
    """

    kind: str
    matches: Callable[[nn.Module], bool]
    shape: Callable[[nn.Module], tuple[int, int]]
    activation: Callable[[nn.Module, Tensor], Tensor]
    output_gradient: Callable[[nn.Module, Tensor], Tensor]
    weight: str = "weight"


_LAYERS: dict[str, Layer] = {}


def register_layer(layer: Layer) -> Layer:
    """Add a layer type; the one registered last wins where several match."""
    _LAYERS[layer.kind] = layer
    return layer


def layer_for(module: nn.Module) -> Layer | None:
    """The layer type of a module, or ``None`` if its gradients cannot be captured yet."""
    return next((layer for layer in reversed(_LAYERS.values()) if layer.matches(module)), None)
