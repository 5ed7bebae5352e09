"""The collector: hooks registered once, per-example gradients of every batch that passes through.

In the forward pass each captured module's input is sketched and kept; in the backward pass the gradient of its output
meets what was kept, and the product is that module's gradient for every example of the batch. Weight gradients are
never formed by autograd, and the graph begins at the first captured module: 2P flops a token forward, 2P backward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradcore._errors import CaptureError
from gradcore._experts import Grouped, OnProduct, watch
from gradcore._module_gradient import ModuleGradient
from gradcore._module_plan import ModulePlan
from gradcore._output_loss import TAKERS, Taker, Taking
from gradcore._pass import Pass
from gradcore._plan import CapturePlan
from gradcore._units import Unit
from gradcore._watch import Watch, is_quantised
from gradcore.layers import Layer, layer_for
from gradcore.layers.experts import is_transposed, matrices

Closure = Callable[[str, Tensor], None]
OnFactors = Callable[[ModuleGradient], None]


_PAUSED: ContextVar[bool] = ContextVar("gradcore_paused", default=False)


@contextmanager
def not_collecting() -> Generator[None]:
    """Inside, collectors let forward passes through as if they were not there: a reference model's, say.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> with GradientCollector(model, CapturePlan.for_model(model)) as collector:
    ...     with torch.no_grad(), not_collecting():
    ...         before = model(torch.ones(1, 4))
    ...     model(torch.ones(3, 4)).square().sum().backward()
    >>> len(collector.rows)
    3
    """
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


class GradientCollector:
    """Collects per-example gradients of the planned modules while a model runs forward and backward.

    Without a closure, gradients gather in :attr:`gradients`, one row an example, in the order the examples came:

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> plan = CapturePlan.for_model(model)
    >>> with GradientCollector(model, plan) as collector:
    ...     model(torch.ones(3, 4)).square().sum().backward()
    >>> collector.gradients["0"].shape  # examples, out, in
    torch.Size([3, 8, 4])

    With one, each module's ``[n, *shape]`` is handed over during the backward pass and freed:

    >>> norms = {}
    >>> def closure(name, gradient):
    ...     norms[name] = gradient.flatten(1).norm(dim=1)
    >>> with GradientCollector(model, plan, closure) as collector:
    ...     model(torch.ones(3, 4)).square().sum().backward()

    With ``factors``, each comes as the :class:`ModuleGradient` it is the product of, whole or, for a two-sided sketch,
    with both sides sketched; nothing is multiplied that is not asked for:

    >>> def factors(gradient):
    ...     norms[gradient.name] = gradient.sq_norm()
    >>> with GradientCollector(model, plan, factors=factors) as collector:
    ...     model(torch.ones(3, 4)).square().sum().backward()

    With ``per_position`` every position of every example has a row of its own, ``examples · positions`` in order; over
    an example they sum to its row.

    The loss must be a sum over examples of functions of that example alone; row ``n`` is then the gradient of its own
    term. Inside the context the parameters of the model are frozen (``requires_grad`` is put back on exit), so that no
    weight gradient is computed. Matrices are always [out, in], however the layer stores its weight.

    While :attr:`enabled` is ``False``, forward passes go through unseen.

    A plan with an output embedding, tied or not, gets its gradient where the module runs, and where
    :func:`per_example_loss` stands in for it. A weight that several modules share has one gradient, of all their uses.

    Args:
        model: any module; the first dimension of every captured input must be the example.
        plan: what to capture.
        closure: called as ``closure(name, gradient)``. A module called several times in one forward pass hands over
            the gradient of each call; their sum is the module's gradient.
        factors: called as ``factors(module_gradient)`` instead.
        per_position: a row a position instead of one an example.
        freeze: switch ``requires_grad`` off inside the context. ``False`` leaves training gradients intact.
        outside: planned modules that do not lie inside ``model``, by the names they have in the plan.

    Raises:
        CaptureError: the model lacks a planned module or has another shape; gradients are switched off; an input was
            changed in place; two modules see different batch sizes; factors of a sketch that has none.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: CapturePlan,
        closure: Closure | None = None,
        *,
        factors: OnFactors | None = None,
        per_position: bool = False,
        freeze: bool = True,
        outside: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if closure is not None and factors is not None:
            raise CaptureError("gradients go to a closure or come as factors, not both")
        if factors is not None and not plan.sketch.bilinear:
            raise CaptureError(f"a {plan.sketch.kind} sketch has no factors: take whole gradients or a two-sided one")
        self.model = model
        self.plan = plan
        self._closure = closure
        self._factors = factors
        self.per_position = per_position
        self.enabled = True
        self._quantised = any(is_quantised(module) for module in model.modules())
        self._freeze = freeze
        self._outside = dict(outside or {})
        self._outputs: list[tuple[nn.Module, Unit]] = []
        self._handles: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []
        self._passes: list[Pass] = []
        self._spare: Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        self._batch = (0, 0)

    def __enter__(self) -> GradientCollector:
        modules = {**dict(self.model.named_modules()), **self._outside}
        uses = [(planned, path) for planned in self.plan.modules for path in (planned.path, *planned.tied)]
        for planned, path in uses:
            module = modules.get(path)
            layer = layer_for(module) if module is not None else None
            if module is None or layer is None or (layer.kind == "experts") != (planned.expert is not None):
                raise CaptureError(f"the model has no module {path!r} that can be captured, the plan does")
            found = _expert_shape(module, planned) if planned.expert else layer.shape(module, planned.bias)
            _require_shape(found, planned)
        if self._freeze:
            everywhere = (self.model, *self._outside.values())
            trained = {id(each): each for root in everywhere for each in root.parameters() if each.requires_grad}
            self._frozen = list(trained.values())
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        experts: dict[str, dict[tuple[str, int], Unit]] = {}
        for planned in self.plan.modules:
            device = _device(modules[planned.path])
            bound = self.plan.sketch.bind(
                planned.name, planned.out_features, planned.in_features, device, planned.elementwise
            )
            normalizer = None if self.plan.normalizer is None else self.plan.normalizer.bind(planned, device)
            for path in (planned.path, *planned.tied):
                module = modules[path]
                layer = layer_for(module)
                assert layer is not None
                unit = Unit(self, planned, layer, bound, normalizer)
                if planned.expert is not None:
                    experts.setdefault(path, {})[planned.expert.parameter, planned.expert.index] = unit
                    continue
                if layer.kind == "linear" and planned.head is None:
                    self._outputs.append((module, unit))
                hook = _forward_hook(self, planned, layer, unit)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        if experts:
            self._handles.append(self.model.register_forward_pre_hook(self._count_examples, with_kwargs=True))
        for path, units in experts.items():
            self._undo.append(watch(modules[path], _expert_hook(self, units)))
        if self._outputs:
            # A bound method is another object each time it is asked for.
            taker = self._take_output
            TAKERS.set((*TAKERS.get(), taker))
            self._undo.append(lambda: _forget(taker))
        return self

    def _take_output(self, weight: Tensor, examples: int) -> Taking | None:
        """What a loss that stands in for a captured linear layer has to hand over."""
        if _PAUSED.get() or not self.enabled:
            return None
        found = [(module, unit) for module, unit in self._outputs if getattr(module, "weight", None) is weight]
        if not found:
            return None
        current = self._pass_for_forward(examples)

        def deliver(blocks: Iterator[tuple[Tensor, Tensor]]) -> None:
            module, unit = found[0]
            prepared = (
                (unit.prepare(unit.layer.forward(module, given, unit.planned.bias)), arrived)
                for given, arrived in blocks
            )
            unit.deliver_blocks(current, prepared)

        return Taking(deliver, whole=self.takes_factors)

    def _count_examples(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Experts see tokens without their examples: how many there are the model's own input says."""
        first = next((each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)), None)
        self._batch = (0, 0) if first is None or first.dim() < 2 else (first.shape[0], first.shape[1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._outputs.clear()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Module name to ``[examples, *shape]`` over all batches since the start or the last :meth:`take`."""
        rows = self.rows
        return {
            name: rows[:, columns].unflatten(1, self.plan.shapes[name]) for name, columns in self.plan.slices.items()
        }

    @property
    def rows(self) -> Tensor:
        """The same as one matrix ``[examples, plan.width]``, modules side by side."""
        finished = [each.finish() for each in self._passes if each.touched]
        if not finished:
            raise CaptureError("nothing was collected: no backward pass reached a captured module inside the context")
        return finished[0] if len(finished) == 1 else torch.cat(finished)

    def take(self) -> Tensor:
        """Hand over :attr:`rows` and begin anew: one call a batch, with hooks and matrices kept.

        The buffer is used again: rows taken before are overwritten by the next batch, so copy what must last.
        """
        rows = self.rows
        self._spare = self._passes[0].rows if len(self._passes) == 1 else None
        self._passes = []
        return rows

    def _pass_for_forward(self, examples: int) -> Pass:
        """The open pass; a forward call after gradients have arrived opens the next, whose batch is this one."""
        inside_backward = torch._C._current_graph_task_id() != -1  # a recomputing checkpoint
        if not self._passes or (self._passes[-1].touched and not inside_backward):
            self._passes.append(Pass(self.plan, self._spare, examples))
            self._spare = None
        return self._passes[-1]

    @property
    def takes_factors(self) -> bool:
        """Whether modules come as factors instead of gradients."""
        return self._factors is not None

    def receive(self, current: Pass, name: str, gradient: Tensor) -> None:
        """Called by hooks: a module's gradients ``[n, *shape]``."""
        if self._closure is not None:
            current.touched.add(name)
            self._closure(name, gradient)
        else:
            current.add(name, gradient)

    def receive_factors(self, current: Pass, gradient: ModuleGradient) -> None:
        """Called by hooks: a module's gradients as factors."""
        assert self._factors is not None
        current.touched.add(gradient.name)
        self._factors(gradient)


def _forget(taker: Taker) -> None:
    TAKERS.set(tuple(each for each in TAKERS.get() if each is not taker))


def _device(module: nn.Module) -> torch.device:
    """Where a module lives; quantised layers may keep their weight as a buffer."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    raise CaptureError(f"{type(module).__name__} has neither parameters nor buffers: there is nothing to capture")


def _require_shape(found: tuple[int, int], planned: ModulePlan) -> None:
    expected, head = (planned.out_features, planned.in_features), planned.head
    if head is None:
        fits = found == expected
    elif head.side == "out":
        fits = head.stop <= found[0] and found[1] == expected[1]
    else:
        fits = found[0] == expected[0] and head.stop <= found[1]
    if not fits:
        raise CaptureError(f"{planned.path} is {list(found)}, the plan says {list(expected)}")


def _forward_hook(collector: GradientCollector, planned: ModulePlan, layer: Layer, unit: Unit) -> Callable[..., Tensor]:
    name = planned.name

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        if _PAUSED.get() or not collector.enabled:
            return output
        if not torch.is_grad_enabled():
            raise CaptureError(
                f"{name} ran with gradients switched off: leave torch.no_grad() and torch.inference_mode() "
                "around the forward pass"
            )
        given = (args[0] if args else next(iter(kwargs.values()))).detach()
        current = collector._pass_for_forward(len(output))
        if len(output) == 1 < current.examples and layer.forward_side == "out":
            # Looked up once for the whole batch, as position tables are: each example has a gradient of its own.
            output = output.expand(current.examples, *output.shape[1:])
            given = given.expand(current.examples, *given.shape[1:])
        kept = unit.prepare(layer.forward(module, given, planned.bias))
        # Held only where the kept factor shares its memory: holding every input would cost what sketching saves.
        shared = isinstance(kept, Tensor) and kept.data_ptr() == given.data_ptr()
        watch = Watch.over(given, may_be_restored=collector._quantised) if shared else None

        def receive(gradient: Tensor) -> None:
            if watch is not None and watch.changed():
                raise CaptureError(f"the input of {name} was changed in place between forward and backward")
            unit.deliver(current, kept, layer.backward(module, gradient))

        if not output.requires_grad:
            # Nothing before needs gradients: root the graph here. The copy lets a later layer work in place.
            output = output.detach().requires_grad_().clone()
        output.register_hook(receive)
        return output

    return hook


def _expert_hook(collector: GradientCollector, units: Mapping[tuple[str, int], Unit]) -> OnProduct:
    def seen(parameter: str, expert: int, tokens: Tensor, given: Tensor, output: Tensor) -> Tensor:
        unit = units.get((parameter, expert))
        if unit is None or _PAUSED.get() or not collector.enabled:
            return output
        if not torch.is_grad_enabled():
            raise CaptureError("experts ran with gradients switched off: leave torch.no_grad() around the forward pass")
        examples, positions = collector._batch
        if not examples or int(tokens.max()) >= examples * positions:
            raise CaptureError(
                "experts saw tokens of no example: the model's first input must be [examples, positions]"
            )
        current = collector._pass_for_forward(examples)
        grouped = Grouped.of(tokens, examples, positions, all_positions=collector.per_position)
        kept = unit.prepare(grouped.spread(given.detach()))
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()
        output.register_hook(lambda gradient: unit.deliver(current, kept, grouped.spread(gradient)))
        return output

    return seen


def _expert_shape(module: nn.Module, planned: ModulePlan) -> tuple[int, int]:
    assert planned.expert is not None
    weights = matrices(module).get(planned.expert.parameter)
    if weights is None or planned.expert.index >= len(weights):
        raise CaptureError(f"the model has no {planned.name}, the plan does")
    out_features, in_features = weights.shape[1:]
    return (in_features, out_features) if is_transposed(module) else (out_features, in_features)
