"""``nn.Linear``: y = x Wᵀ + b, so G = Σ_s g_s x_sᵀ with W's own shape [out, in]."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from gradcore.layers._registry import Layer, register_layer


def _shape(module: nn.Module) -> tuple[int, int]:
    linear = cast(nn.Linear, module)
    return linear.out_features, linear.in_features


def positions(module: nn.Module, tensor: Tensor) -> Tensor:
    """``[n, ..., d]`` to ``[n, s, d]``; a two-dimensional input is one position an example."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


LINEAR = register_layer(
    Layer(
        kind="linear",
        matches=lambda module: isinstance(module, nn.Linear),
        shape=_shape,
        activation=positions,
        output_gradient=positions,
    )
)
