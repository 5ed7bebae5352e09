"""Fused experts of a mixture (Mixtral, Qwen3-MoE, gpt-oss in transformers 5): all experts' matrices in one parameter.

``gate_up_proj`` and ``down_proj`` are ``[experts, out, in]`` or, as gpt-oss stores them, ``[experts, in, out]``. Each
expert's part is a matrix of its own, ``experts.gate_up_proj.expert_3``, and its gradient [out, in] like any other.
Recognised by form, so that transformers need not be installed.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gradcore._errors import CaptureError
from gradcore.layers._registry import Layer, register_layer

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@register_layer
class Experts(Layer):
    """Modules with 3-D parameters of these names, and an eager forward pass that multiplies them expert by expert."""

    kind: ClassVar[str] = "experts"

    def matches(self, module: nn.Module) -> bool:
        """By its parameters."""
        return isinstance(getattr(module, "down_proj", None), nn.Parameter) and bool(matrices(module))

    def shape(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """There is none of the whole: experts are planned one by one."""
        raise CaptureError("the experts of a mixture are planned one by one")

    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> Tensor:
        """``[n, s, in]`` of the tokens that an expert got."""
        return given

    def backward(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """``[n, s, out]``."""
        return gradient

    def covered(self, module: nn.Module, bias: bool) -> tuple[str, ...]:
        """The matrices; biases of experts are not captured."""
        return tuple(matrices(module))


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters by name."""
    found = ((name, getattr(module, name, None)) for name in PARAMETERS)
    return {name: each for name, each in found if isinstance(each, nn.Parameter) and each.dim() == 3}


def is_transposed(module: nn.Module) -> bool:
    """Whether the parameters are stored [experts, in, out]."""
    return bool(getattr(module, "is_transposed", False))
