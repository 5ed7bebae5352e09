"""A circuit as a model of its own: masked weights multiplied out and saved as Hugging Face saves models."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from probing._errors import MaskError
from probing._masks import Masks
from probing._sites import check_plain, expert_parameters, over_weight


def pruned_state_dict(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """The model's state dict with the weights of removed units set to zero; the model is not touched.

    >>> fresh.load_state_dict(pruned_state_dict(model, circuit))  # doctest: +SKIP

    Raises:
        MaskError: masks of another model; whole modules, which have no weights that give zero; or weights tied to
            others (an output layer that shares the embedding's), where pruning one would prune both.
    """
    masks.check(model)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, site in masks.sites.items():
        if site.unit == "module":
            raise MaskError(f"{path!r}: no weights say that a module is off; mask its neurons or heads instead")
        module = model.get_submodule(path)
        check_plain(site, module, "prune")
        names = expert_parameters(module) if site.unit == "expert" else ["weight"]
        for name in names:
            weight = module.get_parameter(name)
            tied = [other for other in owners[id(weight)] if other != f"{path}.{name}"]
            if tied:
                raise MaskError(f"{path}.{name} is tied to {', '.join(tied)}: pruning one would prune both")
            keep = masks.keep[path].to(weight.device)
            keep = keep[:, None] if site.unit == "expert" and weight.ndim == 2 else over_weight(site, module, keep)
            state[f"{path}.{name}"] *= keep.to(weight.dtype)
        if path in masks.bias_keep:
            bias = state[f"{path}.bias"]
            bias *= masks.bias_keep[path].to(bias.device, bias.dtype)
    return state


def export_pruned(model: PreTrainedModel, masks: Masks, folder: str | Path) -> None:
    """Save the circuit as an ordinary model folder, with the masks beside it.

    >>> export_pruned(model, circuit, "circuit-model")  # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained("circuit-model")  # doctest: +SKIP

    Raises:
        MaskError: as `pruned_state_dict`.
    """
    model.save_pretrained(folder, state_dict=pruned_state_dict(model, masks))
    masks.save(Path(folder) / "masks.safetensors")
