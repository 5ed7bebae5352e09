"""``nn.Linear``: y = W x + b, so G = Σ_s g_s x_sᵀ with W's own shape [out, in], and [x, 1] for x with the bias."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from gradcore._factors import with_ones
from gradcore.layers._registry import Layer, has_bias, register_layer


def positions(tensor: Tensor) -> Tensor:
    """``[n, ..., d]`` to ``[n, s, d]``; a two-dimensional input is one position an example."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


@register_layer
class Linear(Layer):
    """Any subclass, too: quantised linears whose forward pass is y = W x + b."""

    kind: ClassVar[str] = "linear"

    def matches(self, module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.Linear)

    def shape(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """``(out, in)``."""
        linear = cast(nn.Linear, module)
        return linear.out_features, linear.in_features + (bias and has_bias(module))

    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> Tensor:
        """The input, and a 1 for the bias."""
        return with_ones(positions(given), bias and has_bias(module))

    def backward(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient of the output."""
        return positions(gradient)
