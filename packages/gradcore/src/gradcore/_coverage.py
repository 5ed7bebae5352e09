"""What a plan covers and what it leaves out, with the reason: nothing is skipped in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from gradcore._plan import CapturePlan
from gradcore.layers import layer_for


@dataclass(frozen=True)
class Uncaptured:
    """Parameters outside the plan: the module that owns them, their names, how many floats, and why."""

    module: str
    kind: str
    parameters: tuple[str, ...]
    floats: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How much of a model a plan captures.

    Attributes:
        captured: floats whose gradients are captured.
        total: floats of all parameters, each shared parameter counted once.
        left_out: what is not captured, in the model's order.
    """

    captured: int
    total: int
    left_out: tuple[Uncaptured, ...]

    @property
    def share(self) -> float:
        """Captured floats over all floats."""
        return self.captured / self.total if self.total else 0.0


def coverage(model: nn.Module, plan: CapturePlan, outside: Mapping[str, nn.Module] | None = None) -> Coverage:
    """Which parameters a plan captures of a model and what lies ``outside`` of it, as for a collector.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    >>> report = coverage(model, CapturePlan.for_model(model))
    >>> report.captured, report.total, report.left_out[0].parameters
    (48, 50, ('bias',))
    """
    modules = {**dict(model.named_modules()), **(outside or {})}
    planned = {path: each for each in plan.modules for path in (each.path, *each.tied)}
    seen: set[int] = set()
    captured, total, left_out = 0, 0, list[Uncaptured]()
    # A shared parameter is captured wherever it is: planned modules come first.
    for name in sorted(modules, key=lambda name: name not in planned):
        module = modules[name]
        layer = layer_for(module)
        missed: dict[str, int] = {}
        for parameter_name, parameter in _own_parameters(module, seen):
            total += parameter.numel()
            if name in planned and layer is not None and parameter_name in layer.covered(module, planned[name].bias):
                captured += parameter.numel()
            else:
                missed[parameter_name] = parameter.numel()
        if missed:
            owner = name.partition(".parametrizations.")[0] if ".parametrizations." in name else ""
            reason = _PARAMETRISED if owner in planned else _reason(name in planned, layer is not None, module)
            left_out.append(Uncaptured(name, type(module).__name__, tuple(missed), sum(missed.values()), reason))
    order = list(modules)
    return Coverage(captured, total, tuple(sorted(left_out, key=lambda each: order.index(each.module))))


_PARAMETRISED = "parametrised: captured is the gradient of the effective weight, not of what it is computed from"


def _own_parameters(module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _reason(planned: bool, known: bool, module: nn.Module) -> str:
    if planned:
        return "only the weight is captured (include_bias adds the bias)"
    return "not selected" if known else f"{type(module).__name__} is not a captured layer type"
