"""What a layer type must say, and the table of those that have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gradcore._factors import Factor

Side = Literal["in", "out"]


class Layer(ABC):
    """How one type of module yields the gradient of its parameters, example by example.

    A *matrix* layer's gradient is a sum over positions of outer products, ``G_n = Σ_s out_ns in_nsᵀ``: one factor is
    known in the forward pass, the other is the gradient of the output. A *vector* layer's is a sum of elementwise
    products.
    """

    kind: ClassVar[str]
    """The name saved in plans, such as ``"linear"``."""
    forward_side: ClassVar[Side] = "in"
    """Which factor the forward pass knows."""
    elementwise: ClassVar[bool] = False
    """Whether this is a vector layer: the gradient of the weight is ``Σ_s forward_ns ⊙ backward_ns``."""

    @property
    def backward_side(self) -> Side:
        """Which factor the backward pass brings."""
        return "in" if self.forward_side == "out" else "out"

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether a module is of this type."""

    @abstractmethod
    def shape(self, module: nn.Module, bias: bool) -> tuple[int, int]:
        """``(out, in)`` of the gradient, whatever the storage order of the weight.

        A bias is one more input that is always 1. A vector layer of width d has shape ``(d, 1)``, ``(d, 2)`` with bias.
        """

    @abstractmethod
    def forward(self, module: nn.Module, given: Tensor, bias: bool) -> Factor:
        """The factor that the input gives: ``[n, s, width of forward_side]``."""

    @abstractmethod
    def backward(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The factor that the gradient of the output gives: ``[n, s, width of the other side]``."""

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Something stored like the parameters, an optimiser's moments say, as the gradient lies: ``[out, in]``."""
        flat = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
        return flat if bias is None else torch.cat((flat, bias[:, None]), dim=1)

    def covered(self, module: nn.Module, bias: bool) -> tuple[str, ...]:
        """Names of the parameters whose gradient is captured."""
        return ("weight", "bias") if bias and has_bias(module) else ("weight",)


def has_bias(module: nn.Module) -> bool:
    """Whether the module has a bias parameter."""
    return isinstance(getattr(module, "bias", None), Tensor)


_LAYERS: dict[str, Layer] = {}


def register_layer(cls: type[Layer]) -> type[Layer]:
    """Class decorator: add a layer type; the one registered last wins where several match."""
    _LAYERS[cls.kind] = cls()
    return cls


def layer_for(module: nn.Module) -> Layer | None:
    """The layer type of a module, or ``None`` if its gradients cannot be captured yet."""
    return next((layer for layer in reversed(_LAYERS.values()) if layer.matches(module)), None)
