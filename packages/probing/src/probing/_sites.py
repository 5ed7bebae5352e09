"""Sites: where masks sit, and what one unit of a site is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradcore import SelectionError, select_modules
from probing._errors import MaskError, SiteError, check_choice
from probing._tensors import model_device

UnitName = Literal["weight", "neuron", "input", "head", "module", "expert"]
UNITS: tuple[str, ...] = get_args(UnitName)
_CONV = (nn.Conv1d, nn.Conv2d)
_WEIGHTED = (nn.Linear, Conv1D, *_CONV)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One masked module and the shape of its mask.

    >>> net = nn.Sequential(nn.Linear(10, 20))
    >>> find_sites(net, "0", "neuron")
    [Site(path='0', unit='neuron', shape=(20,), weights=10, has_bias=True, heads=0)]
    """

    path: str
    unit: UnitName
    shape: tuple[int, ...]
    weights: int
    """How many weights one unit stands for: the fan-in that the paper's penalty multiplies by."""
    has_bias: bool
    heads: int = 0

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(torch.Size(self.shape).numel())


def find_sites(model: nn.Module, patterns: str | Sequence[str], unit: str = "neuron") -> list[Site]:
    """Every site the patterns select, with the shape its mask would have; a dry run that touches nothing.

    Args:
        model: any torch model.
        patterns: exact dotted names, globs (``"transformer.h.0.attn.*"``) or ``"re:…"``.
        unit: ``"weight"``; ``"neuron"`` (an output unit's incoming weights, the bias stays); ``"input"``; ``"head"``
            (on the attention's output projection); ``"module"`` (any module's output, all or nothing); ``"expert"``
            (fused expert tensors of mixture-of-experts layers). A LoRA layer is one site, base and adapter together;
            it and quantised layers have no plain weights, so all but ``"weight"`` and ``"expert"`` sit on them.

    Raises:
        SiteError: a pattern matches nothing, or nothing that can carry such units; close matches are listed.
    """
    check_choice("mask_unit", unit, UNITS)
    # What an adapter is made of is no site of its own: a mask there would leave the other half at work.
    inside = tuple(f"{name}." for name, module in model.named_modules() if adapted(module) is not None)
    try:
        paths = select_modules(model, patterns, where=lambda n, m: _CARRIES[unit](n, m) and not n.startswith(inside))
    except SelectionError as error:
        kinds = _CARRIERS[unit]
        raise SiteError(f"{error} (units of kind {unit!r} sit on {kinds})") from None
    modules = dict(model.named_modules())
    return [_site(model, path, modules[path], cast("UnitName", unit)) for path in paths]


def _site(model: nn.Module, path: str, module: nn.Module, unit: UnitName) -> Site:
    bias = bias_of(module) is not None
    if unit == "expert":
        name = expert_parameters(module)[0]
        weight = module.get_parameter(name)
        return Site(path, unit, (weight.shape[0],), weight[0].numel(), bias)
    if unit == "module":
        return Site(path, unit, (1,), sum(p.numel() for p in module.parameters()), bias)
    if unit == "weight":
        return Site(path, unit, tuple(cast("Tensor", module.weight).shape), 1, bias)
    inputs, outputs, weights = _features(module)
    if unit == "neuron":
        return Site(path, unit, (outputs,), weights // outputs, bias)
    if unit == "head":
        heads = _heads(model, path, inputs)
        return Site(path, unit, (heads,), weights // heads, bias, heads)
    return Site(path, unit, (inputs,), weights // inputs, bias)


def _features(module: nn.Module) -> tuple[int, int, int]:
    """Input channels, output channels, and the number of weights between them."""
    if isinstance(module, _CONV):
        return module.in_channels, module.out_channels, module.weight.numel()
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs, inputs * outputs
    inputs, outputs = cast("tuple[int, int]", (module.in_features, module.out_features))
    return inputs, outputs, inputs * outputs


def adapted(module: nn.Module) -> nn.Module | None:
    """The layer a PEFT adapter (LoRA and its kin) is wrapped around; None for all other modules."""
    base = getattr(module, "base_layer", None)
    return base if isinstance(base, nn.Module) and callable(getattr(module, "get_base_layer", None)) else None


def has_plain_weight(module: nn.Module) -> bool:
    """Whether ``module.weight`` is the floating-point matrix that the module multiplies by, and nothing else is."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(module, _WEIGHTED)
        and adapted(module) is None
        and isinstance(weight, Tensor)
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dtype in _FLOATS
    )


def check_plain(site: Site, module: nn.Module, to: str) -> None:
    """Refuse to ``to`` (rank, exchange, prune) the weights of a layer that has no plain ones.

    Raises:
        MaskError: a LoRA or quantised layer.
    """
    if site.unit not in ("expert", "module") and not has_plain_weight(module):
        raise MaskError(f"{site.path!r} has no plain weights to {to} (LoRA or quantised): merge or dequantise it first")


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias that masks of the weights leave alone: the wrapped layer's for adapters, a method's for some kernels."""
    while (base := adapted(module)) is not None:
        module = base
    bias: Any = getattr(module, "bias", None)
    bias = bias() if callable(bias) and not isinstance(bias, Tensor) else bias
    return bias if isinstance(bias, Tensor) else None


def out_axis(module: nn.Module) -> int:
    """Which axis of the weight runs over output units: 0, but 1 for Hugging Face's Conv1D."""
    return 1 if isinstance(module, Conv1D) else 0


def over_weight(site: Site, module: nn.Module, mask: Tensor) -> Tensor:
    """The mask in a shape that broadcasts over the site's weight (experts: over their down projection)."""
    weight = cast("Tensor", getattr(module, "weight", None))
    if site.unit == "weight":
        return mask
    if site.unit == "expert":
        return mask[:, None, None]
    if site.unit == "head":
        mask = mask.repeat_interleave(weight.shape[1 - out_axis(module)] // site.heads)
    axis = out_axis(module) if site.unit == "neuron" else 1 - out_axis(module)
    if site.unit == "input" and isinstance(module, _CONV) and module.groups > 1:
        per_group = mask.view(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1)
        return per_group.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))
    return mask.view([-1 if i == axis else 1 for i in range(weight.ndim)])


def magnitudes(site: Site, module: nn.Module) -> Tensor:
    """The norm of each unit's weights, fp32, in the shape of the mask: what magnitude pruning ranks.

    Ones for LoRA and quantised layers, whose weights are not there to be ranked.
    """
    if site.unit in ("neuron", "input", "head") and not has_plain_weight(module):
        return torch.ones(site.shape, device=model_device(module))
    if site.unit == "module":
        return torch.stack([p.detach().float().square().sum() for p in module.parameters()]).sum().sqrt()[None]
    name = expert_parameters(module)[0] if site.unit == "expert" else "weight"
    square = module.get_parameter(name).detach().float().square()
    if site.unit == "weight":
        return square.sqrt()
    if site.unit == "expert":
        return square.flatten(1).sum(1).sqrt()
    index = over_weight(site, module, torch.arange(site.units, device=square.device)).expand_as(square)
    total = torch.zeros(site.units, device=square.device).index_add_(0, index.flatten(), square.flatten())
    return total.sqrt()


def expert_parameters(module: nn.Module) -> list[str]:
    """The parameters an expert's contribution is linear in: its down projection, and that one's bias if it has one."""
    own = dict(module.named_parameters(recurse=False))
    down = [name for name, p in own.items() if p.ndim == 3 and any(part in name for part in ("down", "w2", "wo"))]
    return [*down[:1], *[name for name in own if down and name != down[0] and name.startswith(down[0])]]


def _heads(model: nn.Module, path: str, inputs: int) -> int:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or inputs % heads:
        raise SiteError(f"{path!r} reads {inputs} numbers, which do not split into {heads} heads")
    attention = model.get_submodule(path.rpartition(".")[0])
    own = getattr(attention, "num_attention_heads", heads)
    if own != heads:
        raise SiteError(f"{path!r}: its attention has {own} heads beside other channels; mask input units instead")
    return heads


def _is_linear(_: str, module: nn.Module) -> bool:
    """Linear maps by class, or – adapters, other libraries' quantised layers – by having features in and out."""
    if isinstance(module, _WEIGHTED):
        return True
    base = adapted(module)
    if base is not None and (isinstance(base, _CONV) or not _is_linear("", base)):
        return False
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _is_projection(name: str, module: nn.Module) -> bool:
    around, _, last = name.rpartition(".")
    named = last in {"o_proj", "out_proj", "c_proj", "dense", "o", "wo"} and _ATTENTION.search(around) is not None
    return named and not isinstance(module, _CONV) and _is_linear(name, module)


_CARRIES: dict[str, Callable[[str, nn.Module], bool]] = {
    "weight": lambda _, module: has_plain_weight(module),
    "neuron": _is_linear,
    "input": _is_linear,
    "head": _is_projection,
    "module": lambda _, module: not isinstance(module, nn.ModuleList | nn.ModuleDict),
    "expert": lambda _, module: bool(expert_parameters(module)),
}
_LINEAR = "Linear, Conv1D, Conv1d and Conv2d modules, LoRA layers as a whole and quantised linear layers"
_CARRIERS = {
    "weight": "Linear, Conv1D, Conv1d and Conv2d modules with floating-point weights of their own; LoRA and quantised "
    "layers take 'neuron', 'input', 'head' or 'module'",
    "neuron": _LINEAR,
    "input": _LINEAR,
    "head": "the attention's output projection: o_proj, out_proj, c_proj, dense inside a module called attention",
    "module": "modules that are called",
    "expert": "modules with fused three-dimensional expert parameters",
}
