"""What every sketch says: a frozen description (plan) and, bound to one module, two tensor functions (execution)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError


class BoundSketch(ABC):
    """A sketch with the matrices of one module, made once a run."""

    @abstractmethod
    def keep(self, activation: Tensor) -> Tensor:
        """What to hold between forward and backward: ``[n, s, in]`` to ``[n, s, …]``."""

    @abstractmethod
    def contract(self, kept: Tensor, output_gradient: Tensor) -> Tensor:
        """The sketched gradient ``[n, *shape]`` from what was kept and the output gradient ``[n, s, out]``."""


@dataclass(frozen=True)
class Sketch(ABC):
    """A frozen, hashable description of a sketch; subclasses are dataclasses whose fields say everything."""

    kind: ClassVar[str]

    @abstractmethod
    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of one example's sketched gradient for a weight of ``[out, in]``."""

    @abstractmethod
    def bind(self, name: str, out_features: int, in_features: int, device: torch.device) -> BoundSketch:
        """The tensors for one module, on one device."""

    def to_dict(self) -> dict[str, Any]:
        """``{"kind": …, **fields}``, which :func:`sketch_from_dict` reads back."""
        return {"kind": self.kind, **asdict(self)}


_KINDS: dict[str, type[Sketch]] = {}


def register_sketch(cls: type[Sketch]) -> type[Sketch]:
    """Class decorator: make a sketch readable from saved plans under its ``kind``."""
    _KINDS[cls.kind] = cls
    return cls


def sketch_from_dict(saved: Mapping[str, Any]) -> Sketch:
    """Rebuild a sketch from :meth:`Sketch.to_dict`.

    >>> sketch_from_dict({"kind": "identity"})
    Identity()
    """
    fields = dict(saved)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise GradCoreError(f"unknown sketch kind {kind!r}; this version knows {', '.join(sorted(_KINDS))}")
    return _KINDS[kind](**fields)
