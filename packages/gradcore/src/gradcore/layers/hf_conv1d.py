"""Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored [in, out].

The gradient is handed out as [out, in] like every other matrix, so that sketches, heads and curvature see one
orientation. Recognised by name, so that transformers need not be installed.
"""

from __future__ import annotations

from torch import nn

from gradcore.layers._registry import Layer, register_layer
from gradcore.layers.linear import positions


def _is_hf_conv1d(module: nn.Module) -> bool:
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.") for base in type(module).__mro__
    )


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.get_parameter("weight")
    return weight.shape[1], weight.shape[0]


HF_CONV1D = register_layer(
    Layer(
        kind="hf_conv1d",
        matches=_is_hf_conv1d,
        shape=_shape,
        activation=positions,
        output_gradient=positions,
    )
)
