"""What every sketch says: a frozen description (plan) and, bound to one module, three tensor functions (execution).

The gradient of a matrix layer is a sum of outer products, and a sketch is a projection of either factor and a way to
combine them: the gradient itself need not exist.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._factors import Factor, OneHot


class BoundSketch(ABC):
    """A sketch with the matrices of one module, made once a run."""

    @abstractmethod
    def project_out(self, factor: Factor) -> Factor:
        """The out-side factor ``[n, s, out]`` to what is kept of it."""

    @abstractmethod
    def project_in(self, factor: Factor) -> Factor:
        """The in-side factor ``[n, s, in]`` to what is kept of it."""

    @abstractmethod
    def combine(self, out_factor: Factor, in_factor: Factor) -> Tensor:
        """The sketched gradient ``[n, *shape]`` from both projected factors."""

    @abstractmethod
    def vector(self, gradient: Tensor) -> Tensor:
        """The sketch of a vector layer's gradient ``[n, out, in]``, given whole."""

    def matrix(self, gradient: Tensor) -> Tensor:
        """The sketch of a matrix layer's gradient ``[n, out, in]``, given whole: ``G = Σ_o e_o G_oᵀ``, so that its rows
        are factors as good as any."""
        n, out, _ = gradient.shape
        rows = torch.arange(out, device=gradient.device).expand(n, out)
        return self.combine(self.project_out(OneHot(rows, out)), self.project_in(gradient))


@dataclass(frozen=True)
class Sketch(ABC):
    """A frozen, hashable description of a sketch; subclasses are dataclasses whose fields say everything."""

    kind: ClassVar[str]
    summed: ClassVar[bool] = False
    """Whether all modules share the columns, so that a row is the sum of their sketches."""
    bilinear: ClassVar[bool] = False
    """Whether a sketched gradient is the product of its projected factors."""

    @abstractmethod
    def shape(
        self, out_features: int, in_features: int, elementwise: bool = False, *, name: str = ""
    ) -> tuple[int, ...]:
        """Shape of one example's sketched gradient for a gradient of ``[out, in]``."""

    @abstractmethod
    def bind(
        self, name: str, out_features: int, in_features: int, device: torch.device, elementwise: bool = False
    ) -> BoundSketch:
        """The tensors for one module, on one device."""

    def __str__(self) -> str:
        """In a line, however many modules it knows.

        >>> from gradcore import TensorSketch, TwoSided
        >>> str(TwoSided(8)), str(TensorSketch(16, budgets=(("a", 8), ("b", 24))))
        ('two_sided(side=8, entries=rademacher, seed=0)', 'tensor(floats=16, seed=0, budgets=32 in 2 modules)')
        """
        said = [
            f"{each.name}={_brief(value)}"
            for each in fields(self)
            if each.repr and (value := getattr(self, each.name)) not in ("", ())
        ]
        return f"{self.kind}({', '.join(said)})" if said else self.kind

    def to_dict(self) -> dict[str, Any]:
        """``{"kind": …, **fields}``, which :func:`sketch_from_dict` reads back."""
        return {"kind": self.kind, **asdict(self)}


def _brief(value: Any) -> str:
    if isinstance(value, tuple):  # budgets
        return f"{sum(count for _, count in value):,} in {len(value)} modules"
    return value[:12] if isinstance(value, str) else str(value)


_KINDS: dict[str, type[Sketch]] = {}


S = TypeVar("S", bound=Sketch)


def register_sketch(cls: type[S]) -> type[S]:
    """Class decorator: make a sketch readable from saved plans under its ``kind``."""
    _KINDS[cls.kind] = cls
    return cls


def sketch_from_dict(saved: Mapping[str, Any]) -> Sketch:
    """Rebuild a sketch from :meth:`Sketch.to_dict`.

    >>> sketch_from_dict({"kind": "identity"})
    Identity()
    """
    values = dict(saved)
    kind = values.pop("kind", None)
    if kind not in _KINDS:
        raise GradCoreError(f"unknown sketch kind {kind!r}; this version knows {', '.join(sorted(_KINDS))}")
    return _KINDS[kind](**values)
