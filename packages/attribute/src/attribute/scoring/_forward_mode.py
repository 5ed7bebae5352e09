"""Scores of all tokens' losses for one query by a single derivative: d loss / dε at θ + ε q, which is ⟨∇loss, q⟩.

The base model runs once on dual numbers (weights with the query as their tangent), so every hidden state comes with its
change along the query. The loss is then differentiated with respect to the hidden states alone. The product of the two
at position s is the change of the loss of token s + 1 (the influence by output token of Grosse et al. 2023, section
5.3), and their sum that of the row. A backward pass for each token would cost as many passes as there are tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribute._errors import ModelError
from attribute.batching import Batch
from attribute.engine import finite_losses
from attribute.model import LanguageModel
from gradcore import CapturePlan, ModuleGradient, ModulePlan
from gradcore.layers import layer_for

Assemble = Callable[[nn.Module, Tensor, bool], dict[str, Tensor]]
"""Module, its query ``[out, in]``, whether the last input is the bias → parameter → direction."""


def impossible(model: LanguageModel, plan: CapturePlan) -> str:
    """Why the model cannot be differentiated forward, or ``""``."""
    if plan.normalizer is not None:
        return f"gradients under the normaliser {plan.normalizer.kind} are no directions of the weights"
    if _outputs(model, plan) and not model.fused:
        return "the output head rescales its logits, and is captured (--exclude leaves it out)"
    for planned in plan.modules:
        if planned.kind not in _ASSEMBLE:
            return f"{planned.name} is a {planned.kind}, whose parameters are not known as directions"
        weight = getattr(model.module(planned.path), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            return f"{planned.name} is quantised, and has no derivative along its weight"
        if type(weight) is not nn.Parameter:
            return f"{planned.name} is spread over processes"
    return ""


def directions(model: LanguageModel, plan: CapturePlan, query: Tensor) -> dict[str, Tensor]:
    """A query ``[width]`` of whole gradients as parameter name → direction of the parameter's own shape."""
    found = dict[str, Tensor]()
    for planned in plan.modules:
        module = model.module(planned.path)
        matrix = query[plan.slices[planned.name]].reshape(planned.out_features, planned.in_features)
        if (head := planned.head) is not None:
            matrix = _spread(module, matrix, head.side, head.start, planned.bias)
        for name, direction in _ASSEMBLE[planned.kind](module, matrix, planned.bias).items():
            place = f"{planned.path}.{name}"
            found[place] = found[place] + direction if place in found else direction
    return found


def token_derivatives(
    model: LanguageModel, batch: Batch, tangents: Mapping[str, Tensor], plan: CapturePlan
) -> tuple[Tensor, Tensor]:
    """Change ``[n, s]`` of each token's loss along the query whose directions are given, and losses ``[n]``.

    Raises:
        ModelError: the model uses an operation without a forward derivative.
    """
    parameters = dict(model.base.named_parameters(remove_duplicate=False))
    moved = _outputs(model, plan)
    alone = {f"{planned.path}." for planned in moved if planned.path in model.outside}
    try:
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel([SDPBackend.MATH]), warnings.catch_warnings():
            # Some of torch's own derivatives are scripted when they are first needed, which it warns about itself.
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
            dual = {
                name: forward_ad.make_dual(parameters[name].detach(), tangent.to(parameters[name].dtype))
                for name, tangent in tangents.items()
                if not name.startswith(tuple(alone))
            }
            hidden, change = forward_ad.unpack_dual(_hidden(model, dual, batch.input_ids))
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{model.name or 'the model'} has no forward-mode derivative ({str(error).splitlines()[0]}): "
            "--attribute-tokens gradient needs none"
        ) from error
    if change is None:
        change = torch.zeros_like(hidden)
    shares, losses = _through_loss(model, batch, hidden, change, plan, tangents)
    # Position s predicts token s + 1, and the first token is predicted by nothing.
    return torch.cat((shares.new_zeros(len(shares), 1), shares[:, :-1]), dim=1), losses


def _hidden(model: LanguageModel, dual: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    # A weight that is shared gets the direction under the name it was captured by, and nowhere else.
    return functional_call(
        model.base, dual, kwargs={"input_ids": input_ids, "use_cache": False}, tie_weights=False, strict=False
    )[0]


def _outputs(model: LanguageModel, plan: CapturePlan) -> tuple[ModulePlan, ...]:
    """The planned modules that are the output embedding, or tied to it."""
    return tuple(each for each in plan.modules if {each.path, *each.tied} & model.outside.keys())


def _through_loss(
    model: LanguageModel,
    batch: Batch,
    hidden: Tensor,
    change: Tensor,
    plan: CapturePlan,
    tangents: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """What each position contributes ``[n, s]``, and the losses ``[n]``."""
    leaf, held = hidden.detach().requires_grad_(), list[ModuleGradient]()
    outputs = _outputs(model, plan)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_standing_in(model.base, leaf))
        if outputs:  # the loss changes with the output embedding, too: ⟨∂ℓ/∂W, dW⟩ by position
            part = replace(plan, modules=outputs)
            stack.enter_context(model.collector(part, factors=held.append, per_position=True))
        losses = finite_losses(model, batch, plan)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    shares = (gradient.float() * change.float()).sum(-1)
    for planned, found in zip(outputs, held):
        direction = tangents[f"{planned.path}.weight"]
        if planned.bias:
            direction = torch.cat((direction, tangents[f"{planned.path}.bias"][:, None]), dim=1)
        shares += found.dot(direction[None]).view_as(shares)
    return shares, losses.detach()


@contextmanager
def _standing_in(base: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, the base model answers with these hidden states, without running."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    before = vars(base).get("forward")
    base.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[assignment,arg-type]
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


def _linear(module: nn.Module, matrix: Tensor, bias: bool) -> dict[str, Tensor]:
    return {"weight": matrix[:, :-1], "bias": matrix[:, -1]} if bias else {"weight": matrix}


def _transposed(module: nn.Module, matrix: Tensor, bias: bool) -> dict[str, Tensor]:
    found = _linear(module, matrix, bias)
    return {**found, "weight": found["weight"].T}


def _kernel(module: nn.Module, matrix: Tensor, bias: bool) -> dict[str, Tensor]:
    found = _linear(module, matrix, bias)
    return {**found, "weight": found["weight"].reshape(module.get_parameter("weight").shape)}


def _per_channel(module: nn.Module, matrix: Tensor, bias: bool) -> dict[str, Tensor]:
    return {"weight": matrix[:, 0], "bias": matrix[:, 1]} if bias else {"weight": matrix[:, 0]}


_ASSEMBLE: Mapping[str, Assemble] = {
    "linear": _linear,
    "hf_conv1d": _transposed,
    "convolution": _kernel,
    "embedding": _linear,
    "layer_norm": _per_channel,
    "rms_norm": _per_channel,
    "group_norm": _per_channel,
}


def _spread(module: nn.Module, matrix: Tensor, side: str, start: int, bias: bool) -> Tensor:
    """A head's part in the whole module's matrix, zero elsewhere."""
    layer = layer_for(module)
    assert layer is not None
    out_features, in_features = layer.shape(module, bias)
    whole = matrix.new_zeros(out_features, in_features)
    if side == "out":
        whole[start : start + len(matrix)] = matrix
    else:
        whole[:, start : start + matrix.shape[1]] = matrix
    return whole
