"""Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored [in, out].

The gradient is handed out as [out, in] like every other matrix, so that sketches, heads and curvature see one
orientation. Recognised by name, so that transformers need not be installed.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gradcore.layers._registry import has_bias, register_layer
from gradcore.layers.linear import Linear


@register_layer
class HFConv1D(Linear):
    """Linear but for the storage."""

    kind: ClassVar[str] = "hf_conv1d"

    def matches(self, module: nn.Module) -> bool:
        """By the name of a class that transformers defines."""
        return any(
            base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in type(module).__mro__
        )

    def shape(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """``(out, in)``, the transpose of the weight's."""
        weight = module.get_parameter("weight")
        return weight.shape[1], weight.shape[0] + (bias and has_bias(module))

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transpose."""
        return super().matrix(weight.T, bias)
