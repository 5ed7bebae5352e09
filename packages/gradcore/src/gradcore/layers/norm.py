"""Normalisation layers with a weight per channel: y = w ⊙ x̂ + b, so the gradients are Σ_s g_s ⊙ x̂_s and Σ_s g_s.

x̂ is computed again from the input: nothing of the module's own forward pass is needed, and RMS norms of any library are
covered as long as they multiply the normalised input with their weight.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradcore.layers._registry import Layer, has_bias, register_layer
from gradcore.layers.linear import positions


class _Norm(Layer):
    elementwise: ClassVar[bool] = True

    def shape(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """``(channels, 1)``, and 2 with the bias."""
        return module.get_parameter("weight").numel(), 1 + (bias and has_bias(module))

    def backward(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient of the output."""
        return positions(gradient)


@register_layer
class LayerNorm(_Norm):
    """``nn.LayerNorm`` over the last dimension."""

    kind: ClassVar[str] = "layer_norm"

    def matches(self, module: nn.Module) -> bool:
        """With a weight, over one dimension."""
        return isinstance(module, nn.LayerNorm) and module.elementwise_affine and len(module.normalized_shape) == 1

    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> Tensor:
        """x̂ = (x − mean) / std."""
        norm = cast(nn.LayerNorm, module)
        return positions(functional.layer_norm(given, norm.normalized_shape, eps=norm.eps))


@register_layer
class RMSNorm(_Norm):
    """``nn.RMSNorm`` and the classes called ``…RMSNorm`` in transformers (Llama, Qwen, Mistral, T5 …).

    Gemma's multiply with ``1 + w``, whose gradient is the same.
    """

    kind: ClassVar[str] = "rms_norm"

    def matches(self, module: nn.Module) -> bool:
        """By class or by name, with one weight over the last dimension."""
        named = isinstance(module, nn.RMSNorm) or type(module).__name__.endswith("RMSNorm")
        weight = getattr(module, "weight", None)
        return named and isinstance(weight, Tensor) and weight.ndim == 1 and self._eps(module) is not None

    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> Tensor:
        """x̂ = x / √(mean x² + ε), in float32 as the models do it."""
        eps = self._eps(module)
        assert eps is not None
        exact = given.float()
        return positions((exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(given.dtype))

    def _eps(self, module: nn.Module) -> float | None:
        if isinstance(module, nn.RMSNorm):
            return torch.finfo(torch.float32).eps if module.eps is None else module.eps
        found = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
        return next((value for value in found if isinstance(value, float)), None)


@register_layer
class GroupNorm(_Norm):
    """``nn.GroupNorm`` over channels [n, c, ...]."""

    kind: ClassVar[str] = "group_norm"

    def matches(self, module: nn.Module) -> bool:
        """With a weight."""
        return isinstance(module, nn.GroupNorm) and module.affine

    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> Tensor:
        """x̂ with channels last."""
        norm = cast(nn.GroupNorm, module)
        return _channels_last(functional.group_norm(given, norm.num_groups, eps=norm.eps))

    def backward(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient of the output with channels last."""
        return _channels_last(gradient)


def _channels_last(tensor: Tensor) -> Tensor:
    """``[n, c, ...]`` to ``[n, s, c]``."""
    return tensor.reshape(*tensor.shape[:2], -1).mT
