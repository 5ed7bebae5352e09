"""Where a transformer keeps its residual stream, found by arithmetic instead of by a table of architectures.

One random batch runs through the model; inside each block, every module's output is a candidate. The attention and MLP
updates are the two candidates that make the block's own sum come out:

    additive    x + A + B = y                               pre-norm, sandwich-norm and parallel blocks
    post-norm   m = N₁(x + A),  N₂(m + B) = y               BERT and its kin

A model for which neither holds is refused, so a readout can be missing but never silently wrong.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probing._errors import ReadoutError
from probing._tensors import LINEAR_LIKE, copied_arguments, first_tensor, hidden_states, map_tensors, model_device

_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_CROSS = re.compile(r"enc_?dec_?att|cross_?att|encoder_attn|crossattention", re.IGNORECASE)


@dataclass(frozen=True)
class BlockLayout:
    """Which modules of one block write to the residual stream; paths are relative to the whole model."""

    index: int
    path: str
    form: Literal["additive", "post_norm"]
    attn: str
    mlp: str
    cross: str | None = None
    middle: str | None = None
    """Post-norm blocks: the module whose output is the stream between attention and MLP."""
    projection: str | None = None
    """The last linear map of the attention; its input is the concatenated head outputs."""
    sources: tuple[str, str] = ("", "")
    """The first modules to compute the attention and the MLP update; equal to `attn` and `mlp` up to dropout."""
    width: int = 0
    """Width of the residual stream."""


@dataclass
class _Call:
    path: str
    module: nn.Module
    input: Tensor | None
    output: Tensor


def find_blocks(model: nn.Module, blocks: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks: the longest outermost ModuleList whose items share a class.

    Args:
        model: any torch model.
        blocks: the path of the list, for models with several stacks (T5: ``"decoder.block"``).

    Raises:
        ReadoutError: there is no such list, or there are several of the same length.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(item) for item in module}) == 1
    }
    if blocks is not None:
        if blocks not in lists:
            raise ReadoutError(f"blocks={blocks!r} is no list of equal blocks; the model has: {', '.join(lists)}")
        return blocks, lists[blocks]
    outer = {name: item for name, item in lists.items() if not any(name.startswith(other + ".") for other in lists)}
    longest = max((len(item) for item in outer.values()), default=0)
    best = [name for name, item in outer.items() if len(item) == longest]
    if not best:
        raise ReadoutError("the model has no ModuleList of equal blocks, so no residual stream could be found")
    if len(best) > 1:
        raise ReadoutError(f"the model has several stacks of blocks: pass blocks= one of {', '.join(map(repr, best))}")
    return best[0], outer[best[0]]


def example_inputs(model: nn.Module, rows: int = 2, positions: int = 6) -> dict[str, Tensor]:
    """A small random batch the model accepts: token ids, or pixels for vision models.

    Raises:
        ReadoutError: the model says nothing about its inputs.
    """
    config = getattr(model, "config", None)
    device = model_device(model)
    draw = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2  # type: ignore[union-attr]
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(rows, config.num_channels, *size, generator=draw).to(device, dtype)}  # type: ignore[union-attr]
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ReadoutError("the model's config names no vocab_size: pass example={...}, the arguments of one call")
    longest = next(
        (n for key in ("max_position_embeddings", "n_positions") if (n := getattr(text, key, None))), positions
    )
    positions = min(positions, longest)
    # Low ids are special tokens (padding shifts RoBERTa's positions), so draw from the upper half.
    ids = torch.randint(vocabulary // 2, vocabulary, (rows, positions), generator=draw).to(device)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def find_layout(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    blocks: str | None = None,
    example: Mapping[str, Any] | None = None,
) -> list[BlockLayout]:
    """The layout of the asked blocks, each proven on one batch.

    Args:
        model: any transformer; called once, in eval mode, without gradients.
        layers: block indices; ``None`` for all.
        blocks: path of the block list where there are several.
        example: keyword arguments of one forward call; made from the model's config if absent.

    Raises:
        ReadoutError: a layer the model lacks, or a block whose sum does not come out.
    """
    stack, modules = find_blocks(model, blocks)
    wanted = list(range(len(modules))) if layers is None else list(layers)
    for index in wanted:
        if not 0 <= index < len(modules):
            raise ReadoutError(f"layer {index} does not exist: {stack!r} has layers 0 to {len(modules) - 1}")
    inputs = dict(example) if example is not None else example_inputs(model)
    calls = _block_arguments(model, {index: modules[index] for index in wanted}, inputs)
    return [_layout_of(model, index, f"{stack}.{index}", modules[index], *calls[index]) for index in wanted]


def _block_arguments(
    model: nn.Module, blocks: Mapping[int, nn.Module], inputs: Mapping[str, Any]
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def remember(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = copied_arguments(args, kwargs)

        return hook

    handles = [block.register_forward_pre_hook(remember(i), with_kwargs=True) for i, block in blocks.items()]
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True
    missing = sorted(set(blocks) - set(seen))
    if missing:
        raise ReadoutError(f"the example batch does not run layers {missing}; pass example={{...}} that reaches them")
    return seen


def _layout_of(
    model: nn.Module, index: int, path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BlockLayout:
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    if dtype in (torch.bfloat16, torch.float16):
        # Half precision rounds away updates that are small beside the stream: find the sum on an fp32 copy.
        block = copy.deepcopy(block).float()
        args, kwargs = map_tensors((args, kwargs), lambda t: t.float() if t.is_floating_point() else t)
    calls, x, y = _trace(block, path, args, kwargs)
    distinct = _distinct(calls, y)
    found = _additive(distinct, x, y) or _post_norm(distinct, calls, x, y)
    if found is None:
        raise ReadoutError(
            f"block {path!r} ({type(block).__name__}): no two of its {len(distinct)} distinct outputs add up to "
            "block output − block input, nor do they through a post-norm. The block scales or mixes its updates in a "
            "way this package does not know; mask it by module path and read resid_in / resid_out instead"
        )
    form, updates, middle = found
    attn, cross, mlp = _name_updates(updates, path)
    return BlockLayout(
        index=index,
        path=path,
        form=form,
        attn=attn[-1].path,
        mlp=mlp[-1].path,
        cross=cross[-1].path if cross else None,
        middle=middle,
        projection=_projection(attn, calls),
        sources=(attn[0].path, mlp[0].path),
        width=y.shape[-1],
    )


def _trace(
    block: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[_Call], Tensor, Tensor]:
    calls: list[_Call] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            out, given = first_tensor(output), hidden_states(args, kwargs)
            if out is not None:  # cloned: residual sums are often taken in place
                calls.append(_Call(name, module, inputs.pop(name, given), out.detach().clone()))

        return hook

    inputs: dict[str, Tensor | None] = {}

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = hidden_states(args, kwargs)
            inputs[name] = None if given is None else given.detach().clone()

        return hook

    handles = []
    for name, module in block.named_modules():
        full = f"{path}.{name}" if name else path
        handles.append(module.register_forward_pre_hook(before(full), with_kwargs=True))
        handles.append(module.register_forward_hook(watch(full), with_kwargs=True))
    was_training = [module for module in block.modules() if module.training]
    block.eval()
    try:
        with torch.no_grad():
            block(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True
    whole = next(call for call in calls if call.path == path)
    if whole.input is None:
        raise ReadoutError(f"block {path!r} takes no floating tensor, so it has no residual stream")
    # A dropout called for both updates could not tell them apart: keep modules called exactly once.
    times = Counter(call.path for call in calls)
    return [call for call in calls if times[call.path] == 1 and call.path != path], whole.input, whole.output


def _distinct(calls: Sequence[_Call], y: Tensor) -> list[list[_Call]]:
    """Calls grouped by equal output, in order of completion: (c_proj, dropout, attn) is one candidate, not three."""
    groups: list[list[_Call]] = []
    for call in calls:
        if call.output.numel() != y.numel() or call.output.shape[-1] != y.shape[-1]:
            continue
        call.output = call.output.reshape(y.shape)
        for group in groups:
            if torch.equal(group[0].output, call.output):
                group.append(call)
                break
        else:
            groups.append([call])
    return groups


def _close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    # Four roundings of the largest summand; an unrelated tensor misses by its own size.
    return bool(((found - expected).abs() <= 16 * torch.finfo(found.dtype).eps * scale).all())


def _additive(groups: Sequence[list[_Call]], x: Tensor, y: Tensor):
    for terms in (2, 3):
        matches = []
        for chosen in combinations(groups, terms):
            total, scale = x, x.abs() + y.abs()
            for group in chosen:
                total, scale = total + group[0].output, scale + group[0].output.abs()
            if _close(total, y, scale):
                matches.append(chosen)
        if len(matches) == 1:
            return "additive", list(matches[0]), None
        if matches:
            shown = "; ".join(" + ".join(group[-1].path for group in match) for match in matches)
            raise ReadoutError(f"more than one decomposition fits the block ({shown}): are some weights zero?")
    return None


def _post_norm(groups: Sequence[list[_Call]], calls: Sequence[_Call], x: Tensor, y: Tensor):
    same = [call for call in calls if call.output.shape == y.shape]  # `_distinct` has reshaped what has y's size
    normed = [
        (call, call.input.reshape(y.shape))
        for call in same
        if call.input is not None and call.input.numel() == y.numel()
    ]

    def sums(base: Tensor):
        for group in groups:
            total, scale = base + group[0].output, base.abs() + group[0].output.abs()
            yield from ((group, norm) for norm, given in normed if _close(total, given, scale))

    for first, norm in sums(x):
        middle = norm.output
        for second, last in sums(middle):
            if torch.equal(last.output, y) and second is not first:
                alike = [call.path for call in same if torch.equal(call.output, middle)]
                return "post_norm", [first, second], alike[0]
    return None


def _name_updates(updates: list[list[_Call]], path: str) -> tuple[list[_Call], list[_Call] | None, list[_Call]]:
    """Attention is what is called so; without names, the update computed first."""

    def named(group: list[_Call], pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(call.path.removeprefix(path)) for call in group)

    cross = next((group for group in updates if named(group, _CROSS)), None) if len(updates) == 3 else None
    rest = [group for group in updates if group is not cross]
    if len(rest) == 3:  # an unnamed third update between attention and MLP
        cross = rest.pop(1)
    attentions = [group for group in rest if named(group, _ATTENTION)]
    attn = attentions[0] if len(attentions) == 1 else rest[0]
    return attn, cross, next(group for group in rest if group is not attn)


def _projection(attn: Sequence[_Call], calls: Sequence[_Call]) -> str | None:
    exact = [call.path for call in attn if isinstance(call.module, LINEAR_LIKE)]
    if exact:
        return exact[0]
    # Sandwich norm: the update is normed after the projection, so take the last linear map before it.
    order = [call.path for call in calls]
    before = [c.path for c in calls[: order.index(attn[0].path)] if isinstance(c.module, LINEAR_LIKE)]
    return before[-1] if before else None
