"""The plan: what is captured, as one frozen value that is printed, hashed, saved and compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from torch import nn

from gradcore._addressing import select_modules
from gradcore._errors import CaptureError, GradCoreError, PlanMismatch
from gradcore._module_plan import AttentionConfig, ModulePlan
from gradcore.layers import layer_for
from gradcore.normalizers import Normalizer
from gradcore.sketches import Identity, Sketch, sketch_from_dict

REDUCTIONS = ("sum", "mean")
GLOBAL = "global"
MATRICES = ("linear", "hf_conv1d", "experts")
_SHARABLE = ("linear", "embedding")
"""Layers that store their weight as its gradient lies, so that a module of one may use another's."""


@dataclass(frozen=True)
class CapturePlan:
    """What a collector captures: modules, sketch and loss. Equal plans give comparable gradients.

    >>> from torch import nn
    >>> from gradcore import TwoSided
    >>> plan = CapturePlan.for_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), sketch=TwoSided(2))
    >>> plan.width, [module.name for module in plan.modules]
    (8, ['0', '2'])

    Attributes:
        modules: what is captured, in the order of the columns.
        sketch: what is kept of each module's gradient.
        loss: the measured function of the labelled tokens, as :class:`Loss` names it; ``"ce"`` is cross-entropy.
        reduction: ``"sum"`` or ``"mean"`` over an example's labelled tokens.
        model: fingerprint of the weights, ``""`` where it does not matter.
        normalizer: what gradients are multiplied with before they are sketched, or none.
    """

    modules: tuple[ModulePlan, ...]
    sketch: Sketch = field(default_factory=Identity)
    loss: str = "ce"
    reduction: str = "sum"
    model: str = ""
    normalizer: Normalizer | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise CaptureError("a plan without modules captures nothing")
        if self.reduction not in REDUCTIONS:
            raise GradCoreError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {self.reduction!r}")

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        modules: str | Sequence[str] | None = None,
        *,
        exclude: str | Sequence[str] = (),
        kinds: Collection[str] | None = None,
        sketch: Sketch | None = None,
        loss: str = "ce",
        reduction: str = "sum",
        include_bias: bool = False,
        attention: Mapping[str, AttentionConfig] | None = None,
        normalizer: Normalizer | None = None,
        fingerprint: str = "",
        outside: Mapping[str, nn.Module] | None = None,
    ) -> CapturePlan:
        """Plan for every module of a captured layer type that the patterns select (all of them by default).

        Args:
            model: the model.
            modules, exclude: patterns as for :func:`select_modules`.
            kinds: narrows the layer types, to :data:`MATRICES` for the linear layers that most methods are defined on.
            sketch, loss, reduction, normalizer: as the attributes.
            include_bias: capture biases as one more input that is always 1.
            attention: pattern of modules → how their heads lie; each head is then captured under ``module.head_0`` ….
            fingerprint: of the weights.
            outside: further modules that do not lie inside ``model``, by the names they are to have: the output
                embedding beside the base of a language model.

        A weight that several modules share is captured once, under the name of the first that is selected, with the
        uses of all that are not excluded: the gradient of a tied embedding is that of both its ends.

        Raises:
            SelectionError: a pattern matches nothing that can be captured; close matches are listed.
            CaptureError: heads that do not fill their matrix.
        """

        def wanted(_: str, module: nn.Module) -> bool:
            layer = layer_for(module)
            return layer is not None and (kinds is None or layer.kind in kinds)

        known = {**{name: each for name, each in model.named_modules() if name}, **(outside or {})}
        names = select_modules(known, modules, exclude=exclude, where=wanted)
        excluded = select_modules(known, exclude) if exclude else ()
        names, tied = _shared(names, {name: each for name, each in known.items() if name not in set(excluded)})
        mixtures = {name for name in names if _kind(known[name]) == "experts"}
        whole = {
            name: replace(ModulePlan.of(name, known[name], include_bias), tied=tied.get(name, ()))
            for name in names
            if name not in mixtures
        }
        split = {name: ModulePlan.experts(name, known[name]) if name in mixtures else [whole[name]] for name in names}
        for pattern, config in (attention or {}).items():
            for name in select_modules(whole, pattern):
                split[name] = whole[name].heads(config)
        return cls(
            modules=tuple(part for parts in split.values() for part in parts),
            sketch=sketch or Identity(),
            loss=loss,
            reduction=reduction,
            model=fingerprint,
            normalizer=normalizer,
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one example's captured gradient, by module; under ``"global"`` where a sketch sums them."""
        if self.sketch.summed:
            return {GLOBAL: self.sketch.shape(0, 0)}
        return {
            module.name: self.sketch.shape(
                module.out_features, module.in_features, module.elementwise, name=module.name
            )
            for module in self.modules
        }

    @cached_property
    def columns(self) -> dict[str, int]:
        """Floats a row by :attr:`shapes`, in column order."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each module stands in a row."""
        ends, found = 0, dict[str, slice]()
        for name, size in self.columns.items():
            found[name] = slice(ends, ends + size)
            ends += size
        return found

    def column_of(self, module: str) -> str:
        """The name under which a module's gradient stands in :attr:`shapes`, :attr:`columns` and :attr:`slices`."""
        return GLOBAL if self.sketch.summed else module

    @property
    def width(self) -> int:
        """Floats a row."""
        return sum(self.columns.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the saved form: equal digests, equal plans."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form that :meth:`from_dict` reads back."""
        return {
            "modules": [module.to_dict() for module in self.modules],
            "sketch": self.sketch.to_dict(),
            "loss": self.loss,
            "reduction": self.reduction,
            "model": self.model,
            **({} if self.normalizer is None else {"normalizer": self.normalizer.to_dict()}),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> CapturePlan:
        """The plan saved by :meth:`to_dict`; unknown or missing fields are refused."""
        expected = {each.name for each in fields(cls)}
        if set(saved) | {"normalizer"} != expected:
            odd = sorted((set(saved) | {"normalizer"}) ^ expected)
            raise GradCoreError(f"not a capture plan of this version: unexpected or missing {', '.join(odd)}")
        return cls(
            modules=tuple(ModulePlan.from_dict(module) for module in saved["modules"]),
            sketch=sketch_from_dict(saved["sketch"]),
            loss=saved["loss"],
            reduction=saved["reduction"],
            model=saved["model"],
            normalizer=Normalizer(**saved["normalizer"]) if saved.get("normalizer") else None,
        )

    def restrict(self, patterns: str | Sequence[str]) -> CapturePlan:
        """The plan of the modules that match, everything else equal."""
        names = set(select_modules((module.name for module in self.modules), patterns))
        return replace(self, modules=tuple(module for module in self.modules if module.name in names))

    def require_equal(self, other: CapturePlan, *, this: str = "this", that: str = "the other") -> None:
        """Raise :class:`PlanMismatch` unless both plans capture the same thing.

        The message names the first field that differs, both values, and how to mend it.
        """
        for name, remedy in _REMEDIES.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found, expected = _said(mine), _said(theirs)
                if name == "modules":
                    found, expected = _difference(self.modules, other.modules)
                raise PlanMismatch(f"{name} differs ({this}: {found}; {that}: {expected}): {remedy}")


# In the order in which a user would want to hear of them: another model explains other modules.
_REMEDIES = {
    "modules": "use the model the gradients were collected from, or collect them again with the same modules",
    "model": "these are other weights of the same shape: use the very checkpoint the gradients were collected from",
    "sketch": "use the same sketch (--sketch, --sketch-floats, --projection-dim, --projection-seed) on both sides; a "
    "spectral one belongs to one index, and is the same only where that index is named",
    "normalizer": "use the same normaliser (--normalizer, --processor-path) on both sides",
    "loss": "use the same --loss-fn on both sides",
    "reduction": "use the same --loss-reduction on both sides",
}


def _shared(names: Sequence[str], known: Mapping[str, nn.Module]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The selected modules without those whose weight an earlier one has, and for each the others with its weight."""
    uses: dict[int, list[str]] = {}
    for name, module in known.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and _kind(module) in _SHARABLE:
            uses.setdefault(id(weight), []).append(name)
    kept, tied, seen = list[str](), dict[str, tuple[str, ...]](), set[str]()
    for name in names:
        if name in seen:
            continue
        kept.append(name)
        others = uses.get(id(getattr(known[name], "weight", None)), [])
        if name in others and len(others) > 1:
            tied[name] = tuple(each for each in others if each != name)
            seen.update(others)
    return kept, tied


def _kind(module: nn.Module) -> str:
    layer = layer_for(module)
    return "" if layer is None else layer.kind


def _said(value: object) -> str:
    return str(value) if isinstance(value, Sketch) else repr(value)


def _difference(mine: tuple[ModulePlan, ...], theirs: tuple[ModulePlan, ...]) -> tuple[str, str]:
    """The first place where two lists of modules part."""
    for left, right in zip(mine, theirs):
        if left != right:
            return _show(left), _show(right)
    return f"{len(mine)} modules", f"{len(theirs)} modules"


def _show(module: ModulePlan) -> str:
    return f"{module.name} [{module.out_features}, {module.in_features}]"
