"""What to mask where nobody says: the modules that compute what a readout reads, found in the graph of one run.

A module belongs to the attention (MLP, cross-attention) of a block if its output changes that update while the block's
other updates stand still. Names play no part, so parallel blocks, post-norm, sandwich norms and MLPs without a module
of their own come out alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probing._errors import SiteError
from probing._readout import Readout, head_count
from probing._sites import find_sites
from probing._structure import BlockLayout, example_inputs, find_layout
from probing._tensors import first_tensor, replace_first_tensor

_ALL = ("attn", "cross", "mlp")
_PARTS = {
    "attn_update": ("attn",),
    "attn_stream": ("attn",),
    "resid_mid": ("attn",),
    "head_output": ("attn",),
    "cross_update": ("cross",),
    "mlp_update": ("mlp",),
    "mlp_stream": ("mlp",),
    "resid_out": _ALL,
    "resid_in": _ALL,
}


def default_sites(model: nn.Module, readout: Readout, unit: str, blocks: str | None = None) -> list[str]:
    """Paths of the modules that compute what the readout reads, as far as they can carry such units.

    >>> default_sites(model, Readout("mlp_update", 1), "neuron")  # doctest: +SKIP
    ['transformer.h.1.mlp.c_fc', 'transformer.h.1.mlp.c_proj']

    ``attn_update``, ``attn_stream`` and ``resid_mid`` are given the attention of their layer, ``head_output`` what lies
    before its projection, ``mlp_update`` and ``mlp_stream`` the MLP, ``resid_out`` both, ``resid_in`` both of the layer
    before. A module that several updates share belongs to none.

    Raises:
        SiteError: nothing there that could carry such units; the message says what to type.
        ReadoutError: a layer, or an update, that the model lacks.
    """
    before = readout.kind == "resid_in"
    if before and readout.layer == 0:
        raise SiteError(
            "resid_in_0 is the embedding: no layer comes before it, so there is nothing to mask; probe resid_out_0, or "
            "name modules with --sites"
        )
    layout = find_layout(model, [readout.layer - before], blocks=blocks)[0]
    parts = [part for part in _PARTS[readout.kind] if getattr(layout, part)]
    if unit == "module":
        return _whole(layout, parts, readout)
    if readout.kind == "head_output" or (unit == "head" and "attn" in parts):
        head_count(model, layout)
    found = _of_parts(model, layout, parts, unit, readout.kind == "head_output")
    if unit not in ("head", "expert") and (experts := _of_parts(model, layout, parts, "expert")):
        beside = f", or mask the linear maps beside them: --sites {' --sites '.join(found)}" if found else ""
        raise SiteError(
            f"{readout.key} is computed by experts ({experts[0]}), whose weights are one tensor without units of kind "
            f"{unit!r}; type --unit expert{beside}"
        )
    if not found:
        raise SiteError(_nothing(readout, unit))
    return found


def _whole(layout: BlockLayout, parts: Sequence[str], readout: Readout) -> list[str]:
    if readout.kind == "head_output":
        raise SiteError(
            f"{readout.key} lies inside the attention, so masking the whole of it changes nothing there; type --unit "
            "neuron, or --unit head"
        )
    return [str(getattr(layout, part)) for part in parts]


def _nothing(readout: Readout, unit: str) -> str:
    if unit == "head" and readout.kind.startswith("mlp"):
        return (
            f"heads are the attention's, and {readout.key} reads the MLP; type --unit neuron, or probe "
            f"attn_update_{readout.layer}"
        )
    other = "neuron" if unit != "neuron" else "module"
    return f"nothing that computes {readout.key} can carry units of kind {unit!r}; type --unit {other}"


def _of_parts(model: nn.Module, layout: BlockLayout, parts: Sequence[str], unit: str, heads: bool = False) -> list[str]:
    """The modules that can carry such units and belong to one of these parts of the block, and to no other."""
    try:
        paths = [site.path for site in find_sites(model, f"{layout.path}.*", unit)]
    except SiteError:
        return []
    inputs = unit in ("head", "input")
    every = [part for part in _ALL if getattr(layout, part)]
    reaching = {part: _reaching(model, layout, part, paths, inputs) for part in every}
    own = [[path for path in paths if [p for p in every if path in reaching[p]] == [part]] for part in parts]
    inside = _reaching(model, layout, "attn", paths, inputs, heads=True) if heads else set(paths)
    return [path for each in own for path in each if path in inside]


def _reaching(
    model: nn.Module, layout: BlockLayout, part: str, paths: Sequence[str], inputs: bool, heads: bool = False
) -> set[str]:
    """The modules whose outputs (or inputs) reach the part's update, or the heads it is made of, with the block's other
    updates held still."""
    nudges: dict[str, list[Tensor]] = {path: [] for path in paths}
    seen: list[Tensor] = []

    def nudged(path: str, value: Any) -> Any:
        found = first_tensor(value)
        if found is None:
            return value
        nudges[path].append(torch.zeros_like(found, requires_grad=True))
        return replace_first_tensor(value, found + nudges[path][-1])

    def before(path: str, _: nn.Module, args: Any) -> Any:
        return nudged(path, args)

    def after(path: str, _: nn.Module, args: Any, output: Any) -> Any:
        return nudged(path, output)

    def still(_: nn.Module, args: Any, output: Any) -> Any:
        found = first_tensor(output)
        assert found is not None
        return replace_first_tensor(output, found.detach().clone())

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            if inputs:
                handle = module.register_forward_pre_hook(partial(before, path))
            else:
                handle = module.register_forward_hook(partial(after, path))
            stack.callback(handle.remove)
        for other in _ALL:
            if other != part and getattr(layout, other):
                held = model.get_submodule(getattr(layout, other))
                stack.callback(held.register_forward_hook(still).remove)
        if heads:
            target = model.get_submodule(str(layout.projection))
            handle = target.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        else:
            target = model.get_submodule(getattr(layout, part))
            handle = target.register_forward_hook(lambda _, args, output: seen.append(first_tensor(output)))  # type: ignore[arg-type]
        stack.callback(handle.remove)
        with torch.enable_grad():
            model(**example_inputs(model))
    flat = [(path, nudge) for path, each in nudges.items() for nudge in each]
    gradients = torch.autograd.grad(seen[-1].sum(), [nudge for _, nudge in flat], allow_unused=True)
    return {path for (path, _), gradient in zip(flat, gradients) if gradient is not None}
