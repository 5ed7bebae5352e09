"""Reading and replacing activations anywhere in any module: tuple or tensor outputs, positional or keyword calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from natsort import natsorted
from torch import Tensor, nn

from gradcore import SelectionError, select_modules
from sparsify._errors import HookpointError


class Site(NamedTuple):
    """What went into a hookpoint's module and what came out; the input only where it was asked for."""

    input: Tensor | None
    output: Tensor


Replacement = Callable[[Tensor | None, Tensor], Tensor]
"""From a module's input and output to the tensor that stands in for the output; the input is None where it is ids."""


class _AllReached(BaseException):
    """Leaves a forward pass once every hookpoint has been seen. Not an Exception: models may catch those."""


def base_of(model: nn.Module) -> nn.Module:
    """The module hookpoint names are relative to: a transformer without its head, or the module itself."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def find_hookpoints(
    model: nn.Module, patterns: Sequence[str] = (), layers: Sequence[int] = (), stride: int = 1
) -> list[str]:
    """Module names for patterns or layer numbers (all layers by default), naturally sorted, every stride-th.

    >>> find_hookpoints(gpt2, ["h.[012].attn"])  # doctest: +SKIP
    ['h.0.attn', 'h.1.attn', 'h.2.attn']
    """
    base = base_of(model)
    if patterns:
        try:
            return natsorted(select_modules(base, list(patterns)))[::stride]
        except SelectionError as error:
            raise HookpointError(str(error)) from None
    name, count = _layer_list(base, model)
    for layer in layers:
        if not 0 <= layer < count:
            raise HookpointError(f"layer {layer} does not exist: {name} has layers 0 to {count - 1}")
    return [f"{name}.{i}" for i in (layers or range(count))][::stride]


def _layer_list(base: nn.Module, model: nn.Module) -> tuple[str, int]:
    config: Any = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    lists = {name: len(m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [name for name, length in lists.items() if depth is None or length == depth]
    if len(fitting) != 1:
        found = ", ".join(f"{n} ({lists[n]})" for n in fitting) if fitting else "none"
        raise HookpointError(
            f"cannot tell which list of modules holds the layers (expected one of length {depth}; found {found}): "
            "name the hookpoints"
        )
    return fitting[0], lists[fitting[0]]


def hook_of(name: str) -> str:
    """The hookpoint of a coder: ``hookpoint/seedN`` is the coder with seed N of one that has several.

    >>> hook_of("layers.10/seed0")
    'layers.10'
    """
    return name.partition("/seed")[0]


def run(
    model: nn.Module, tokens: Tensor, hookpoints: Sequence[str], *, inputs: bool | Collection[str] = False
) -> dict[str, Site]:
    """One forward pass, stopped as soon as every hookpoint has been reached; a module called twice counts once.

    Args:
        inputs: whether, or at which hookpoints, inputs are wanted too.

    Raises:
        HookpointError: there is no such module, it is never reached, or it yields no tensor.
    """
    base = base_of(model)
    sites: dict[str, Site] = {}
    wanted = inputs if not isinstance(inputs, bool) else hookpoints if inputs else ()

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in sites:
                return
            sites[name] = Site(first_input(args, kwargs, name) if name in wanted else None, first_output(output, name))
            if len(sites) == len(hookpoints):
                raise _AllReached

        return record

    modules = _modules(base, hookpoints)
    handles = [module.register_forward_hook(recorder(n), with_kwargs=True) for n, module in modules.items()]
    try:
        call(base, tokens)
    except _AllReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in hookpoints if name not in sites]
    if missing:
        raise HookpointError(
            f"the forward pass never calls {', '.join(missing[:5])}: hook the module that is called, such as its parent"
        )
    return {name: sites[name] for name in hookpoints}


@contextmanager
def spliced(model: nn.Module, replace: Mapping[str, Replacement]) -> Iterator[None]:
    """While open, each hookpoint's output tensor becomes ``replace[name](input, output)``; its other outputs stay.

    The model is as before when the block ends, however it ends.
    """
    base = base_of(model)

    def splicer(name: str) -> Callable[..., Any]:
        def splice(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            old = first_output(output, name)
            new = replace[name](_real_input(args, kwargs), old)
            return _with_first(output, new.to(old.dtype))

        return splice

    modules = _modules(base, replace)
    handles = [module.register_forward_hook(splicer(n), with_kwargs=True) for n, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _modules(base: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    known = dict(base.named_modules())
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(list(known)[1:6])}, ..."
            raise HookpointError(f"the model has no module {name!r}; {hint}")
    return {name: known[name] for name in names}


def call(model: nn.Module, tokens: Tensor) -> Any:
    """Call a model on a batch of token ids, or of other rows, the way its kind expects."""
    if hasattr(model, "config") and hasattr(model, "get_input_embeddings"):
        return model(input_ids=tokens, use_cache=False)
    return model(tokens)


def device_of(model: nn.Module) -> torch.device:
    """Where the model expects its inputs."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def frozen(model: nn.Module, *, no_parameter_gradients: bool = False) -> Iterator[None]:
    """Evaluation mode, and on request no gradients for parameters; both are put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()} if no_parameter_gradients else {}
    model.eval()
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, flag in wanted.items():
            p.requires_grad_(flag)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor:
    """The module's main input: its first tensor argument, ``hidden_states`` among keywords."""
    found = _real_input(args, kwargs)
    if found is None:
        raise HookpointError(f"{name} is not called with a tensor of real numbers, so it has no input to read")
    return found


def _real_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    for value in [*args, kwargs.get("hidden_states"), *kwargs.values()]:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None


def first_output(output: Any, name: str) -> Tensor:
    """The module's main output: the tensor, or the first of a tuple or model output."""
    value = output
    if isinstance(output, Mapping):
        value = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        value = output[0] if output else None
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
        return value
    raise HookpointError(f"{name} returns {type(value).__name__}, not a tensor of activations")


def _with_first(output: Any, new: Tensor) -> Any:
    if isinstance(output, Mapping):
        changed = dict(output.items())
        changed[next(iter(changed))] = new
        return type(output)(**changed)
    if isinstance(output, (tuple, list)):
        rest = list(output)[1:]
        return type(output)(new, *rest) if hasattr(output, "_fields") else type(output)([new, *rest])
    return new
