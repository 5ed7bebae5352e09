"""Second moments out of an optimiser: a live one, its state, or the ``optimizer.pt`` of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradcore._errors import GradCoreError
from gradcore.layers import layer_for

# Parameters that Hugging Face's Trainer keeps from weight decay and so puts into a second group.
_UNDECAYED = tuple(re.compile(p) for p in ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"))


def optimizer_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | str | Path,
    *,
    within: nn.Module | None = None,
    outside: Mapping[str, nn.Module] | None = None,
    bias_corrected: bool = False,
) -> dict[str, Tensor]:
    """Second moments of the weights by module path, as gradients lie: ``[out, in]``, with a bias one column more.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer_moments(model, optimizer)["0"].shape
    torch.Size([2, 4])

    Args:
        model: the model that was trained.
        optimizer: Adam (or a kin with ``exp_avg_sq``) or Adafactor: the optimiser, its ``state_dict()``, an
            ``optimizer.pt``, or a checkpoint folder with one. A state names parameters by number: in the model's order,
            or in Hugging Face's two groups, those with weight decay first.
        within: the part of the model whose modules are captured; paths are relative to it.
        outside: captured modules that lie elsewhere, by the names they have in plans.
        bias_corrected: divide by ``1 − β₂ᵗ``, as Adam does before it takes the root.

    Raises:
        GradCoreError: no state for any captured module; a number or shapes of parameters that are not the model's; a
            state in 8 bits.
    """
    by_parameter = _live(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else _saved(model, optimizer)
    found: dict[str, Tensor] = {}
    for path, module in {**dict((within or model).named_modules()), **(outside or {})}.items():
        layer = layer_for(module)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if layer is None or id(weight) not in by_parameter:
            continue
        assert isinstance(weight, nn.Parameter)
        moment = _moment(path, weight, *by_parameter[id(weight)], bias_corrected)
        extra = None
        if isinstance(bias, nn.Parameter) and id(bias) in by_parameter:
            extra = _moment(path, bias, *by_parameter[id(bias)], bias_corrected)
        found[path] = layer.matrix(moment, extra)
    if not found:
        raise GradCoreError(
            "the optimiser has second moments of none of the modules that can be captured: is it this model's, and has "
            "it made a step?"
        )
    return found


_State = tuple[Mapping[str, Any], float]  # of one parameter, and β₂


def _live(optimizer: torch.optim.Optimizer) -> dict[int, _State]:
    return {
        id(parameter): (optimizer.state[parameter], _beta(group))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    }


def _saved(model: nn.Module, saved: Mapping[str, Any] | str | Path) -> dict[int, _State]:
    where = "the optimiser's state"
    if not isinstance(saved, Mapping):
        path = Path(saved)
        path = path / "optimizer.pt" if path.is_dir() else path
        where = str(path)
        if not path.is_file():
            raise GradCoreError(f"{path} is not there: --optimizer-state-path takes an optimizer.pt or its folder")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise GradCoreError(
                f"{path} cannot be read as an optimiser's state: {str(error).splitlines()[0]}"
            ) from error
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise GradCoreError(f"{where} is no optimiser's state: it has no 'state' and 'param_groups'")
    groups = saved["param_groups"]
    ordered = _ordered(model, groups, where)
    found: dict[int, _State] = {}
    for group, parameters in zip(groups, ordered):
        for number, (name, parameter) in zip(group["params"], parameters):
            state = saved["state"].get(number)
            if state is None:
                continue
            first = state.get("exp_avg")
            if isinstance(first, Tensor) and first.numel() > 1 and first.shape != parameter.shape:
                raise GradCoreError(
                    f"{where} has {list(first.shape)} where the model has {name} {list(parameter.shape)}: it belongs "
                    "to another model, or to other parameters of this one"
                )
            found[id(parameter)] = (state, _beta(group))
    return found


def _ordered(model: nn.Module, groups: Sequence[Mapping[str, Any]], where: str) -> list[list[tuple[str, nn.Parameter]]]:
    """The model's parameters in the order of the groups."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    counts = [len(group["params"]) for group in groups]
    named = dict(trained)
    if all("param_names" in group and set(group["param_names"]) <= set(named) for group in groups):
        return [[(name, named[name]) for name in group["param_names"]] for group in groups]
    if sum(counts) != len(trained):
        raise GradCoreError(
            f"{where} has {sum(counts)} parameters, the model trains {len(trained)}: it belongs to another model, or "
            "some of the parameters were frozen"
        )
    if len(groups) == 1:
        return [trained]
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    undecayed = [
        name.rpartition(".")[0] in norms or any(pattern.search(name.lower()) for pattern in _UNDECAYED)
        for name, _ in trained
    ]
    split = [[each for each, free in zip(trained, undecayed) if free is chosen] for chosen in (False, True)]
    if [len(part) for part in split] == counts:
        return split
    raise GradCoreError(
        f"{where} has groups of {', '.join(map(str, counts))} parameters: neither one group in the model's order nor "
        f"those with and without weight decay ({len(split[0])} and {len(split[1])}). Give the live optimiser instead"
    )


def _beta(group: Mapping[str, Any]) -> float:
    betas = group.get("betas")
    return float(betas[1]) if betas is not None else 0.0


def _moment(path: str, parameter: nn.Parameter, state: Mapping[str, Any], beta: float, bias_corrected: bool) -> Tensor:
    """The second moment of one parameter in float32, in its own shape."""
    if "state2" in state:
        raise GradCoreError(f"{path}: the optimiser keeps its moments in 8 bits, which are not read here")
    if isinstance(found := state.get("exp_avg_sq", state.get("variance")), Tensor):
        moment = found
    else:
        row, column = (state.get(f"exp_avg_sq_{side}", state.get(f"{side}_var")) for side in ("row", "col"))
        if not isinstance(row, Tensor) or not isinstance(column, Tensor):
            known = ", ".join(state) or "nothing"
            raise GradCoreError(f"{path}: the optimiser keeps no second moments (it keeps {known})")
        # Shazeer & Stern 2018, algorithm 4, over the last two dimensions; torch keeps them as [a, 1] and [1, b].
        row = row if row.shape[-1:] == (1,) and row.dim() == parameter.dim() else row[..., None]
        column = column if column.dim() == parameter.dim() else column[..., None, :]
        moment = row * column / row.mean(-2, keepdim=True).clamp(min=1e-30)
    if moment.shape != parameter.shape:
        raise GradCoreError(
            f"{path}: second moments of {list(moment.shape)} for a parameter of {list(parameter.shape)}"
        )
    moment = moment.detach().float()
    if bias_corrected:
        step = float(state.get("step", 0))
        if not beta or not step:
            raise GradCoreError(f"{path}: no bias correction without Adam's β₂ and number of steps")
        moment = moment / (1 - beta**step)
    return moment
