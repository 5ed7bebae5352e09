"""``nn.Conv1d``, ``Conv2d`` and ``Conv3d``: at each output position a linear layer over the patch below it.

The patches come from strided views of the padded input, so stride, dilation and every padding mode are exact. Groups
are further positions: group j's patches meet the output gradient with all other channels zero. The matrix is
[out, in/groups · kernel], the flattened weight.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradcore._factors import with_ones
from gradcore.layers._registry import Layer, has_bias, register_layer


@register_layer
class Convolution(Layer):
    """Convolutions over one, two or three dimensions."""

    kind: ClassVar[str] = "convolution"

    def matches(self, module: nn.Module) -> bool:
        """By class; transposed convolutions are not of these classes."""
        return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def shape(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """``(out, in/groups · kernel)``."""
        weight = module.get_parameter("weight")
        return weight.shape[0], weight[0].numel() + (bias and has_bias(module))

    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> Tensor:
        """The patches ``[n, positions · groups, in/groups · kernel]``."""
        conv = cast(nn.Conv2d, module)
        patches = _patches(conv, given)  # [n, in, positions, kernel]
        n, channels, places, kernel = patches.shape
        grouped = patches.reshape(n, conv.groups, channels // conv.groups, places, kernel).permute(0, 3, 1, 2, 4)
        return with_ones(grouped.reshape(n, places * conv.groups, -1), bias and has_bias(module))

    def backward(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient of the output ``[n, positions · groups, out]``, zero outside its group."""
        conv = cast(nn.Conv2d, module)
        places = gradient.reshape(*gradient.shape[:2], -1).mT  # [n, positions, out]
        if conv.groups == 1:
            return places
        member = torch.arange(conv.out_channels, device=gradient.device) // (conv.out_channels // conv.groups)
        mask = member == torch.arange(conv.groups, device=gradient.device)[:, None]  # [groups, out]
        return (places[:, :, None] * mask).flatten(1, 2)


def _patches(conv: nn.Conv2d, given: Tensor) -> Tensor:
    """``[n, in, *spatial]`` to ``[n, in, positions, kernel]``, both flattened in row-major order."""
    padded = functional.pad(
        given,
        conv._reversed_padding_repeated_twice,
        mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode,
    )
    size, strides = list(padded.shape[:2]), list(padded.stride()[:2])
    windows, steps = list[int](), list[int]()
    for axis, (kernel, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation), start=2):
        size.append((padded.shape[axis] - dilation * (kernel - 1) - 1) // stride + 1)
        strides.append(padded.stride(axis) * stride)
        windows.append(kernel)
        steps.append(padded.stride(axis) * dilation)
    view = padded.as_strided(size + windows, strides + steps)
    n, channels = padded.shape[:2]
    kernel_size = int(torch.tensor(windows).prod())
    return view.reshape(n, channels, -1, kernel_size)
