"""One captured unit of a plan: a module, or an attention head's part of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gradcore._errors import CaptureError
from gradcore.layers import layer_for


@dataclass(frozen=True)
class AttentionConfig:
    """How the heads of an attention module lie in one of its matrices.

    >>> AttentionConfig(num_heads=16, head_size=4)
    AttentionConfig(num_heads=16, head_size=4, head_dim=2, side='out')

    Args:
        num_heads: heads in this matrix; key and value projections of grouped-query attention have fewer.
        head_size: width of a head.
        head_dim: the axis of the module's output ``[n, s, out]`` along which heads lie; the last one, 2 or −1.
        side: ``"out"`` splits the output (query, key and value projections), ``"in"`` the input, where the heads of an
            output projection lie.
    """

    num_heads: int
    head_size: int
    head_dim: int = 2
    side: str = "out"

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.head_size < 1:
            raise CaptureError(f"heads and head size must be positive, not {self.num_heads} and {self.head_size}")
        if self.side not in ("out", "in"):
            raise CaptureError(f"side must be 'out' or 'in', not {self.side!r}")
        if self.head_dim not in (2, -1):
            raise CaptureError(f"heads lie along the last axis of [n, s, features], 2 or -1, not {self.head_dim}")


@dataclass(frozen=True)
class HeadSlice:
    """Features ``start`` to ``stop`` on one side of a module."""

    module: str
    side: str
    start: int
    stop: int


@dataclass(frozen=True)
class ModulePlan:
    """One captured module: its dotted name, layer kind and gradient shape [out, in].

    Attributes:
        bias: whether the bias is captured as one more input that is always 1.
        elementwise: whether this is a vector layer, whose gradient has no low-rank form.
        head: the part of a module that is captured under this name, or ``None`` for all of it.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    bias: bool = False
    elementwise: bool = False
    head: HeadSlice | None = None

    @property
    def path(self) -> str:
        """Where the module is in the model."""
        return self.name if self.head is None else self.head.module

    @classmethod
    def of(cls, name: str, module: nn.Module, include_bias: bool) -> ModulePlan:
        """The plan of a whole module of a captured layer type."""
        layer = layer_for(module)
        if layer is None:
            raise CaptureError(f"{name} is a {type(module).__name__}, which is not a captured layer type")
        bias = include_bias and "bias" in layer.covered(module, True)
        out_features, in_features = layer.shape(module, bias)
        return cls(name, layer.kind, out_features, in_features, bias, layer.elementwise)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ModulePlan:
        """The plan saved by ``dataclasses.asdict``."""
        whole = cls(**{name: value for name, value in saved.items() if name != "head"})
        return whole if saved["head"] is None else replace(whole, head=HeadSlice(**saved["head"]))

    def heads(self, config: AttentionConfig) -> list[ModulePlan]:
        """One plan a head, named ``module.head_0`` and so on.

        Raises:
            CaptureError: the heads do not fill the matrix.
        """
        total, width = config.num_heads * config.head_size, self.out_features
        if config.side == "in":
            width = self.in_features - self.bias
        if self.elementwise or total != width:
            raise CaptureError(
                f"{self.name} has {width} features on its {config.side}put side, {config.num_heads} heads of "
                f"{config.head_size} make {total}"
            )
        return [self._head(config, number) for number in range(config.num_heads)]

    def _head(self, config: AttentionConfig, number: int) -> ModulePlan:
        start = number * config.head_size
        head = HeadSlice(self.name, config.side, start, start + config.head_size)
        name = f"{self.name}.head_{number}"
        if config.side == "out":
            return replace(self, name=name, out_features=config.head_size, head=head)
        # The bias belongs to no head's input.
        return replace(self, name=name, in_features=config.head_size, bias=False, head=head)
