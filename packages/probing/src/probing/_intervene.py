"""The one place that changes what a model computes, and puts it back.

An intervention replaces units of a site: ``keep·value + (1 − keep)·fill``. Everything is installed on entry of a
context and gone on exit; parameters are never written to, so the base model is bit-equal afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probing._errors import MaskError
from probing._sites import Site, bias_of, check_plain, expert_parameters, has_plain_weight, over_weight
from probing._tensors import first_tensor, replace_first_tensor


@dataclass(frozen=True)
class Intervention:
    """What happens at one site.

    ``keep`` has the site's shape and any values in [0, 1]; in activation space also [rows, units], a mask for each row.
    ``bias_keep`` masks the bias of its own accord. ``fill`` is the value removed units take, in activation space
    (broadcast against the activation); ``weights`` the values removed units' weights take. Without either they take
    zero.
    """

    site: Site
    keep: Tensor
    bias_keep: Tensor | None = None
    fill: Tensor | None = None
    weights: Tensor | None = None


@contextmanager
def intervened(model: nn.Module, interventions: Sequence[Intervention]) -> Iterator[nn.Module]:
    """The model with all interventions in place, for as long as the context lasts."""
    with ExitStack() as stack:
        for item in interventions:
            stack.enter_context(_one(model.get_submodule(item.site.path), item))
        yield model


@contextmanager
def swapped(module: nn.Module, name: str, value: Tensor | None) -> Iterator[None]:
    """``module.name`` reads ``value`` (a tensor with a graph is fine) until the context ends."""
    original = module._parameters[name]
    module._parameters[name] = value  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters[name] = original


def _one(module: nn.Module, item: Intervention) -> Any:
    unit = item.site.unit
    if item.weights is not None:
        return _in_weights(module, item)
    if unit in ("weight", "expert"):
        if item.fill is not None:
            raise MaskError(f"{item.site.path!r}: a unit of kind {unit!r} has no activation to replace; ablate weights")
        return _in_weights(module, item)
    if unit == "neuron":
        return _outputs(module, item)
    if unit == "module":
        return _whole(module, item)
    return _inputs(module, item)


@contextmanager
def _in_weights(module: nn.Module, item: Intervention) -> Iterator[None]:
    site = item.site
    if site.unit == "module":
        raise MaskError(
            f"{site.path!r}: a whole module has no weight of its own to exchange; use zero or mean ablation"
        )
    check_plain(site, module, "exchange")
    names = expert_parameters(module) if site.unit == "expert" else ["weight"]
    with ExitStack() as stack:
        for name in names:
            weight = module.get_parameter(name)
            keep = item.keep.to(weight.dtype)
            keep = keep[:, None] if weight.ndim == 2 and site.unit == "expert" else over_weight(site, module, keep)
            masked = weight * keep
            if item.weights is not None:
                masked = masked + item.weights.to(weight.dtype) * (1 - keep)
            stack.enter_context(swapped(module, name, masked))
        if item.bias_keep is not None:
            bias = module.get_parameter("bias")
            stack.enter_context(swapped(module, "bias", bias * item.bias_keep.to(bias.dtype)))
        yield


@contextmanager
def _outputs(module: nn.Module, item: Intervention) -> Iterator[None]:
    """y = keep·(xW) + b, without a copy of the weight: a scale per channel on the output."""
    bias, own = bias_of(module), has_plain_weight(module)
    channels_last = not isinstance(module, nn.Conv1d | nn.Conv2d)

    def along(vector: Tensor, output: Tensor) -> Tensor:
        vector = _by_row(vector.to(output.dtype), output)
        return vector if channels_last else vector.view(-1, *[1] * (module.weight.ndim - 2))  # type: ignore[union-attr]

    def hook(_: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):  # a router that is a linear layer, with more than one output
            raise MaskError(
                f"{item.site.path!r} returns a {type(output).__name__}, not its neurons alone: leave it out of the "
                "masked sites"
            )
        keep = along(item.keep, output)
        shift = None if bias is None else along(bias, output)
        if shift is not None and not own:
            output = output - shift
        if shift is not None and item.bias_keep is not None:
            shift = shift * along(item.bias_keep, output)
        if item.fill is not None:
            fill = item.fill.to(output.dtype)
            fill = (fill if fill.ndim > 1 else along(fill, output)) * (1 - keep)
            shift = fill if shift is None else fill + shift
        return output * keep if shift is None else _Scaled.apply(output, keep, shift)  # type: ignore[no-any-return]

    with ExitStack() as stack:
        if bias is not None and own:  # other layers may insist on theirs: it is taken off their output instead
            # Conv1D's addmm wants some bias; for the others none at all is cheaper.
            stack.enter_context(swapped(module, "bias", torch.zeros_like(bias) if isinstance(module, Conv1D) else None))
        # First among the hooks: a readout on this very module must see the masked value.
        stack.callback(module.register_forward_hook(hook, prepend=True).remove)
        yield


class _Scaled(torch.autograd.Function):
    """shift + output · keep, both vectors along the last axis: addcmul, whose own backward makes a copy more."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, keep: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(output, keep)
        ctx.shift = shift.shape
        return torch.addcmul(shift, output, keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        output, keep = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            grad * keep if needs[0] else None,
            (grad * output).sum_to_size(keep.shape) if needs[1] else None,
            grad.sum_to_size(ctx.shift) if needs[2] else None,
        )


def _by_row(mask: Tensor, value: Tensor) -> Tensor:
    """A mask of each row its own, [rows, units], against a value [rows, …, units]; a plain mask as it is."""
    return mask if mask.ndim == 1 else mask.view(len(mask), *[1] * (value.ndim - 2), mask.shape[-1])


@contextmanager
def _inputs(module: nn.Module, item: Intervention) -> Iterator[None]:
    """Masked inputs, or heads: a scale per channel on what the module reads."""
    site = item.site

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        keep = item.keep.to(x.dtype)
        if site.unit == "head":
            keep = keep.repeat_interleave(x.shape[-1] // site.heads, -1)
        keep = _by_row(keep, x)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            keep = keep.view(-1, *[1] * (module.weight.ndim - 2))
        masked = x * keep
        if item.fill is not None:
            masked = masked + item.fill.to(x.dtype) * (1 - keep)
        return (masked, *args[1:])

    handle = module.register_forward_pre_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _whole(module: nn.Module, item: Intervention) -> Iterator[None]:
    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        value = first_tensor(output)
        if value is None:
            raise MaskError(f"{item.site.path!r} returns no tensor that could be masked")
        keep = item.keep.to(value.dtype)
        masked = value * keep
        if item.fill is not None:
            masked = masked + item.fill.to(value.dtype) * (1 - keep)
        return replace_first_tensor(output, masked)

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """What an activation-space intervention would replace at each site, as the model runs: where fills come from."""
    seen: dict[str, Tensor] = {}
    handles: list[Any] = []

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = first_tensor(output)
            assert value is not None
            bias = bias_of(module)
            if bias is not None:
                shape = [-1, *[1] * (module.weight.ndim - 2)] if isinstance(module, nn.Conv1d | nn.Conv2d) else [-1]  # type: ignore[union-attr]
                value = value - bias.view(shape)
            seen[path] = value.detach()

        return hook

    def whole(path: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            value = first_tensor(output)
            assert value is not None
            seen[path] = value.detach().clone()

        return hook

    def before(path: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            seen[path] = args[0].detach()

        return hook

    for site in sites:
        module = model.get_submodule(site.path)
        if site.unit in ("weight", "expert"):
            raise MaskError(f"{site.path!r}: a unit of kind {site.unit!r} has no activation; ablate in weight space")
        if site.unit == "neuron":
            handles.append(module.register_forward_hook(after(site.path)))
        elif site.unit == "module":
            handles.append(module.register_forward_hook(whole(site.path)))
        else:
            handles.append(module.register_forward_pre_hook(before(site.path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
