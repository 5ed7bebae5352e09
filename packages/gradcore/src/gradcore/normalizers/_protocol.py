"""What a normaliser is: a rule from second moments to scales, and the scales of one model, known by their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcore._errors import GradCoreError
from gradcore._module_plan import ModulePlan
from gradcore._tensor_bytes import tensor_bytes
from gradcore.normalizers._bound import BoundNormalizer, Dense, Factored


@dataclass(frozen=True)
class Scale:
    """What a module's gradient ``[out, in]`` is multiplied with: ``dense``, or ``out [out]`` and ``into [in]``."""

    dense: Tensor | None = None
    out: Tensor | None = None
    into: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        found = {"dense": self.dense, "out": self.out, "into": self.into}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


Rule = Callable[[Tensor], Scale]
_RULES: dict[str, Rule] = {}


def register_normalizer(kind: str) -> Callable[[Rule], Rule]:
    """Function decorator: a rule from the second moments ``[out, in]`` of a matrix to its :class:`Scale`."""

    def register(rule: Rule) -> Rule:
        _RULES[kind] = rule
        return rule

    return register


def normalizer_kinds() -> tuple[str, ...]:
    """All that are registered."""
    return tuple(sorted(_RULES))


@dataclass(frozen=True)
class Normalizer:
    """Gradients are multiplied, before they are sketched, with what an optimiser would multiply them with.

    >>> normalizer = Normalizer.of_moments("adam", {"layer": torch.full((2, 3), 4.0)})
    >>> normalizer.scales["layer"].dense[0, 0].item()
    0.5

    Attributes:
        kind: one of :func:`normalizer_kinds`.
        digest: of the scales: equal digests, comparable gradients.
        scales: module path → :class:`Scale`; left out of comparisons and of the saved plan, see :meth:`tensors`.
    """

    kind: str
    digest: str = ""
    scales: Mapping[str, Scale] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in _RULES:
            raise GradCoreError(f"a normaliser is one of {', '.join(normalizer_kinds())}, not {self.kind!r}")

    @classmethod
    def of_moments(cls, kind: str, moments: Mapping[str, Tensor]) -> Normalizer:
        """From second moments ``[out, in]`` by module path; a bias is one more input, a vector layer ``[d, 1 or 2]``.

        Raises:
            GradCoreError: an unknown kind; moments that are negative or not finite.
        """
        if kind not in _RULES:
            raise GradCoreError(f"a normaliser is one of {', '.join(normalizer_kinds())}, not {kind!r}")
        for name, moment in moments.items():
            if not moment.isfinite().all() or moment.min() < 0:
                raise GradCoreError(
                    f"the second moments of {name} are negative or not finite: no normaliser comes of them"
                )
        return cls._of_scales(kind, {name: _RULES[kind](moment.float()) for name, moment in moments.items()})

    @classmethod
    def from_tensors(cls, kind: str, tensors: Mapping[str, Tensor]) -> Normalizer:
        """What :meth:`tensors` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("|")
            parts.setdefault(name, {})[part] = tensor
        return cls._of_scales(kind, {name: Scale(**found) for name, found in parts.items()})

    @classmethod
    def _of_scales(cls, kind: str, scales: Mapping[str, Scale]) -> Normalizer:
        state = hashlib.sha256()
        for name in sorted(scales):
            for part, tensor in sorted(scales[name].tensors().items()):
                state.update(f"{name}|{part}{list(tensor.shape)}".encode())
                state.update(tensor_bytes(tensor))
        return cls(kind, state.hexdigest()[:32], dict(scales))

    @property
    def factored(self) -> bool:
        """Whether scaling leaves gradients in factors."""
        return all(scale.dense is None for scale in self.scales.values())

    def tensors(self) -> dict[str, Tensor]:
        """``"path|part"`` → tensor, for a file."""
        return {
            f"{name}|{part}": tensor.contiguous()
            for name, scale in self.scales.items()
            for part, tensor in scale.tensors().items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Kind and digest, without the scales."""
        return {"kind": self.kind, "digest": self.digest}

    def bind(self, planned: ModulePlan, device: torch.device) -> BoundNormalizer:
        """The scales of one planned module, or of the head of one.

        Raises:
            GradCoreError: the normaliser has none for it, or of another shape.
        """
        scale = self.scales.get(planned.matrix)
        if scale is None:
            known = "it was saved without its scales" if not self.scales else f"it knows {len(self.scales)} others"
            raise GradCoreError(f"the {self.kind} normaliser has no scales for {planned.matrix}: {known}")
        rows = columns = slice(None)
        if planned.head is not None:
            cut = slice(planned.head.start, planned.head.stop)
            rows, columns = (cut, columns) if planned.head.side == "out" else (rows, cut)
        if scale.dense is not None:
            dense = scale.dense[rows, columns][:, : planned.in_features]
            self._require(planned, dense.shape)
            return Dense(self.kind, dense.to(device))
        assert scale.out is not None
        assert scale.into is not None
        out, into = scale.out[rows], scale.into[columns][: planned.in_features]
        self._require(planned, (len(out), len(into)))
        return Factored(self.kind, out.to(device), into.to(device))

    def _require(self, planned: ModulePlan, found: tuple[int, ...]) -> None:
        expected = (planned.out_features, planned.in_features)
        if tuple(found) != expected:
            raise GradCoreError(
                f"{planned.name} is {list(expected)}, the {self.kind} normaliser has scales of {list(found)} for it: "
                "was it made with the same modules and --include-bias?"
            )
