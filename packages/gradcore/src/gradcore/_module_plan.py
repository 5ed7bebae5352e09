"""One captured unit of a plan: a module, or an attention head's part of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from gradcore._errors import CaptureError
from gradcore.layers import layer_for
from gradcore.layers.experts import is_transposed, matrices


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
class ExpertSlice:
    """Expert ``index`` of one parameter of a mixture."""

    module: str
    parameter: str
    index: int


@dataclass(frozen=True)
class ModulePlan:
    """One captured module: its dotted name, layer kind and gradient shape [out, in].

    Attributes:
        bias: whether the bias is captured as one more input that is always 1.
        elementwise: whether this is a vector layer, whose gradient has no low-rank form.
        head: the part of a module that is captured under this name, or ``None`` for all of it.
        expert: which matrix of a mixture's experts, or ``None``.
        tied: other modules with the same weight, whose uses of it count, too.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    bias: bool = False
    elementwise: bool = False
    head: HeadSlice | None = None
    expert: ExpertSlice | None = None
    tied: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where the module is in the model."""
        part = self.head or self.expert
        return self.name if part is None else part.module

    @property
    def matrix(self) -> str:
        """The matrix this is of, or a part of: an expert's own name, or the module's."""
        return self.name if self.expert is not None else self.path

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form that :meth:`from_dict` reads back."""
        saved = asdict(self)
        for late in ("expert", "tied"):  # plans from before there were any keep their digest
            if not saved[late]:
                del saved[late]
        return saved

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
    def experts(cls, name: str, module: nn.Module) -> list[ModulePlan]:
        """One plan for each matrix of each expert, named ``module.gate_up_proj.expert_0`` and so on."""
        found = []
        for parameter, weights in matrices(module).items():
            count, out_features, in_features = weights.shape
            if is_transposed(module):
                out_features, in_features = in_features, out_features
            found += [
                cls(
                    f"{name}.{parameter}.expert_{index}",
                    "experts",
                    out_features,
                    in_features,
                    expert=ExpertSlice(name, parameter, index),
                )
                for index in range(count)
            ]
        return found

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ModulePlan:
        """The plan saved by ``dataclasses.asdict``."""
        parts = ("head", "expert")
        whole = cls(**{name: value for name, value in saved.items() if name not in parts})
        whole = replace(whole, tied=tuple(whole.tied))
        if saved["head"] is not None:
            whole = replace(whole, head=HeadSlice(**saved["head"]))
        return whole if saved.get("expert") is None else replace(whole, expert=ExpertSlice(**saved["expert"]))

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
