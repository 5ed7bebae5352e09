"""Ablation: the model with some units taken out, and what is put in their place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probing._circuit import fresh_weights
from probing._errors import MaskError, check_choice
from probing._intervene import Intervention, intervened, recorded
from probing._masks import Masks
from probing._sites import check_plain, expert_parameters
from probing._tensors import first_tensor

How = Literal["zero", "mean", "resample", "random"]
Space = Literal["activation", "weight"]


class Ablated(nn.Module):
    """A model without the given units; called like the model, which itself stays as it is.

    >>> without = Ablated(model, circuit, "mean", reference={"input_ids": ids})  # doctest: +SKIP
    >>> without(input_ids=ids).logits  # doctest: +SKIP

    In activation space a removed unit gives 0; its mean over the reference rows and positions; what it gives on another
    row of the same batch (resample: rows are shifted by one, so a batch needs two rows); or a normal draw of its mean
    and deviation. In weight space its weights become 0; the site's mean weight; weights drawn from the site's others;
    or fresh initial values. Zero is the same in both; biases stay, unless the masks hold some.

    Args:
        model: any model.
        remove: True for the units taken out; ``~circuit`` leaves only the circuit.
        how: what they give instead.
        space: whether activations or weights are replaced.
        reference: the model's arguments for the rows that means and deviations are taken over.
        seed: of anything drawn.
        same_weights: refuse masks found in a model of other weights.

    Raises:
        MaskError: masks of another model; units without activations ("weight", "expert") in activation space; a mean
            without reference rows.
    """

    def __init__(
        self,
        model: nn.Module,
        remove: Masks,
        how: How = "zero",
        space: Space = "activation",
        *,
        reference: Mapping[str, Any] | None = None,
        seed: int = 0,
        same_weights: bool = True,
    ) -> None:
        super().__init__()
        check_choice("how", how, ("zero", "mean", "resample", "random"))
        check_choice("space", space, ("activation", "weight"))
        remove.check(model, same_weights=same_weights)
        self.wrapped_model, self.how, self.space = model, how, space
        self._sites = list(remove.sites.values())
        keep = {item.site.path: item for item in (~remove).interventions(model)}
        generator = torch.Generator().manual_seed(seed)
        self._items = list(keep.values())
        if how == "zero":
            return
        if space == "weight":
            self._items = [_in_weights(model, item, how, generator) for item in self._items]
        elif how != "resample":
            if reference is None:
                raise MaskError(f"how={how!r} replaces activations by statistics: pass reference={{…}}, some inputs")
            means = _statistics(model, remove, reference)
            self._items = [_from_statistics(item, means[item.site.path], how, generator) for item in self._items]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output without the removed units."""
        items = self._items
        if self.how == "resample" and self.space == "activation":
            items = self._resampled(args, kwargs)
        with intervened(self.wrapped_model, items):
            return self.wrapped_model(*args, **kwargs)

    def _resampled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Intervention]:
        first = first_tensor(args)
        rows = len(next(v for v in (first, *args, *kwargs.values()) if isinstance(v, Tensor)))
        if rows < 2:
            raise MaskError(
                "how='resample' takes values from another row of the batch, but this batch has only one: measure rows "
                "in batches of at least two"
            )

        def shift(value: Any) -> Any:
            return value.roll(1, 0) if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

        with torch.no_grad(), recorded(self.wrapped_model, self._sites) as seen:
            self.wrapped_model(*map(shift, args), **{name: shift(value) for name, value in kwargs.items()})
        return [Intervention(i.site, i.keep, i.bias_keep, fill=seen[i.site.path]) for i in self._items]


def _statistics(model: nn.Module, masks: Masks, reference: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    sites = list(masks.sites.values())
    with torch.no_grad(), recorded(model, sites) as seen:
        model(**reference)
    found = {}
    for site in sites:
        value = seen[site.path].float()
        channels_last = not isinstance(model.get_submodule(site.path), nn.Conv1d | nn.Conv2d)
        flat = value.flatten(0, -2) if channels_last else value.transpose(0, 1).flatten(1).T
        attended = _attended(site.path, reference)
        if isinstance(attended, Tensor) and attended.numel() == len(flat):
            flat = flat[attended.flatten().bool()]  # padding is no activation of the model's
        found[site.path] = flat.mean(0), flat.std(0, unbiased=False)
    return found


_KEYS_OF_ENCODER = re.compile(r"(enc_?dec_?att|cross_?att|encoder_attn)[^.]*\.(k|v|key|value)(_proj)?$", re.IGNORECASE)


def _attended(path: str, reference: Mapping[str, Any]) -> Any:
    """The mask of the positions that a site sees: in a decoder with an encoder, those of the encoder's only where
    cross-attention reads them."""
    if "decoder_input_ids" in reference and "decoder" in path.split(".") and not _KEYS_OF_ENCODER.search(path):
        return reference.get("decoder_attention_mask")
    return reference.get("attention_mask")


def _from_statistics(
    item: Intervention, statistics: tuple[Tensor, Tensor], how: How, generator: torch.Generator
) -> Intervention:
    mean, deviation = statistics
    if how == "random":
        mean = mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device)
    return Intervention(item.site, item.keep, item.bias_keep, fill=mean)


def _in_weights(model: nn.Module, item: Intervention, how: How, generator: torch.Generator) -> Intervention:
    site, module = item.site, model.get_submodule(item.site.path)
    if site.unit == "module":
        raise MaskError(f"{site.path!r}: a whole module has no weight of its own; ablate in activation space")
    check_plain(site, module, "exchange")
    weight = module.get_parameter(expert_parameters(module)[0] if site.unit == "expert" else "weight").detach()
    if how == "random":
        new = fresh_weights(module, site, generator)
    elif how == "mean":
        new = weight.float().mean().to(weight.dtype).expand_as(weight)
    else:
        drawn = torch.randint(weight.numel(), (weight.numel(),), generator=generator).to(weight.device)
        new = weight.flatten()[drawn].view(weight.shape)
    return Intervention(site, item.keep, item.bias_keep, weights=new)
