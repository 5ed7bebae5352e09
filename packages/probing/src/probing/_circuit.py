"""A model seen through masks: train them, binarise them, ablate them – and hand the model back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probing._borrowed import borrowed, given_back
from probing._configs import ABLATIONS, CircuitConfig
from probing._controls import sample_like
from probing._errors import ConfigError, MaskError, SiteError, check_choice
from probing._intervene import Intervention, intervened
from probing._masks import Masks, weights_digest
from probing._rules import Magnitude, MaskRule
from probing._sites import Site, bias_of, check_plain, expert_parameters, find_sites, magnitudes


class SiteMask(nn.Module):
    """The logits of one site (and of its bias, if that is masked), and the masks they stand for."""

    def __init__(
        self, site: Site, rule: MaskRule, norms: Tensor, bias: Tensor | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.site, self.rule = site, rule
        self.logits = nn.Parameter(rule.initial(norms, generator), requires_grad=rule.trainable)
        bias_logits = None if bias is None else rule.initial(bias.detach().float().abs(), generator)
        self.bias_logits = None if bias_logits is None else nn.Parameter(bias_logits, requires_grad=rule.trainable)
        self.active = True

    def hard(self) -> Tensor:
        """The units in the circuit, boolean."""
        return self.rule.hard(self.logits.detach())

    def hard_bias(self) -> Tensor | None:
        """The bias entries in the circuit, boolean."""
        return None if self.bias_logits is None else self.rule.hard(self.bias_logits.detach())

    def kept(self, temperature: float, soft: bool) -> tuple[Tensor, Tensor | None]:
        """The share of each unit and of each bias entry that counts as kept."""
        if not soft:
            bias = self.hard_bias()
            return self.hard().to(self.logits.dtype), None if bias is None else bias.to(self.logits.dtype)
        bias = None if self.bias_logits is None else self.rule.kept(self.bias_logits, temperature)
        return self.rule.kept(self.logits, temperature), bias


class CircuitModel(nn.Module):
    """A model whose sites are masked: soft while training, binary in eval mode.

    >>> config = CircuitConfig(  # doctest: +SKIP
    ...     "continuous_sparsification", {"mask_unit": "neuron"}, ["transformer.h.0.mlp.c_*"], l0_lambda=1e-6
    ... )
    >>> circuit = CircuitModel(config, model)  # doctest: +SKIP
    >>> circuit.train()(input_ids=ids, labels=ids).loss.backward()  # doctest: +SKIP
    >>> circuit.eval().masks().size  # doctest: +SKIP
    412

    Masks act only while this object's ``forward`` runs, or inside ``with circuit.applied(): …``; called directly, the
    base model computes what it always did. ``close()`` (or ``with CircuitModel(…) as circuit``) also gives it back its
    training flags and gradients' flags.

    Args:
        config: what to mask and how.
        model: any torch model.

    Raises:
        SiteError: ``target_layers`` match nothing that can be masked so.
    """

    def __init__(self, config: CircuitConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.wrapped_model = model
        self.rule = config.rule()
        self._temperature = 1.0
        self._ablation = config.ablation
        self._drawn: dict[str, Any] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        sites = find_sites(model, config.target_layers, config.mask_unit) if config.target_layers else []
        if config.mask_bias and not any(site.has_bias for site in sites):
            raise SiteError("mask_bias=True, but none of the target layers has a bias")
        self.site_masks = nn.ModuleList(self._site_mask(site) for site in sites)
        borrowed(model, self)
        if config.freeze_base:
            model.requires_grad_(False)
        self.train(model.training)

    def _site_mask(self, site: Site) -> SiteMask:
        module = self.wrapped_model.get_submodule(site.path)
        bias = bias_of(module) if self.config.mask_bias and site.has_bias else None
        if type(self.rule) is Magnitude:
            check_plain(site, module, "rank")
        norms = magnitudes(site, module)
        return SiteMask(site, self.rule, norms, bias, self._generator(norms.device)).to(norms.device)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.config.seed)
        return self._generators[device]

    @property
    def sites(self) -> list[Site]:
        """The masked sites, in the model's order."""
        return [mask.site for mask in self.each()]

    def each(self) -> Iterator[SiteMask]:
        """The masks, in the model's order."""
        return (cast("SiteMask", mask) for mask in self.site_masks)

    @property
    def temperature(self) -> float:
        """β of the annealed rules: 1 at the start, larger is harder; the others do not look at it."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if not value > 0:
            raise ConfigError(f"temperature={value} must be positive: it multiplies the logits")
        self._temperature = float(value)

    def train(self, mode: bool = True) -> Self:
        """Training mode for the masks; for the base model too, unless it is frozen."""
        super().train(mode)
        if self.config.freeze_base:
            self.wrapped_model.eval()
        return self

    def set_ablate_mode(self, mode: str, force_resample: bool = False) -> None:
        """What eval mode removes: everything but the circuit (``"none"``), or the circuit itself, or a random control.

        Args:
            mode: ``"none"``, ``"zero_ablate"`` (the circuit gives zero), ``"random_ablate"`` (its weights are drawn
                anew), ``"randomly_sampled"`` (as many units drawn from all), ``"complement_sampled"`` (… from outside
                it).
            force_resample: draw again instead of reusing the last draw; weights and biases alike.
        """
        check_choice("ablation", mode, ABLATIONS)
        self._ablation = mode
        if force_resample:
            self._drawn.clear()

    @property
    def ablation(self) -> str:
        """What eval mode removes: see `set_ablate_mode`."""
        return self._ablation

    def random_state(self) -> dict[str, Tensor]:
        """The state of the masks' random numbers, by device."""
        return {str(device): generator.get_state() for device, generator in self._generators.items()}

    def restore_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Draw again from there."""
        for device, random in state.items():
            self._generator(torch.device(device)).set_state(random)

    def use_masks(self, value: bool, name_list: str | Sequence[str] | None = None) -> None:
        """Turn masks on or off, all or those whose module path matches one of the patterns."""
        patterns = ["*"] if name_list is None else [name_list] if isinstance(name_list, str) else list(name_list)
        hits = [mask for mask in self.each() if any(fnmatchcase(mask.site.path, p) for p in patterns)]
        if name_list is not None and not hits:
            paths = ", ".join(mask.site.path for mask in self.each())
            raise SiteError(f"no masked site matches {name_list!r}; the sites are: {paths}")
        for mask in hits:
            mask.active = value

    def interventions(self) -> list[Intervention]:
        """What this model currently changes in its base, as data."""
        if self.training and self._ablation != "none":
            raise MaskError(f"ablation {self._ablation!r} is for trained masks: call .eval() first")
        return [self._intervention(mask) for mask in self.each() if mask.active]

    def _intervention(self, mask: SiteMask) -> Intervention:
        if self.training:
            generator = self._generator(mask.logits.device)
            bias = None if mask.bias_logits is None else self.rule.soft(mask.bias_logits, self._temperature, generator)
            return Intervention(mask.site, self.rule.soft(mask.logits, self._temperature, generator), bias)
        keep, bias = self._binary(mask)
        weights = self._fresh_weights(mask.site) if self._ablation == "random_ablate" else None
        dtype = mask.logits.dtype
        return Intervention(mask.site, keep.to(dtype), None if bias is None else bias.to(dtype), weights=weights)

    def _binary(self, mask: SiteMask) -> tuple[Tensor, Tensor | None]:
        keep, bias = mask.hard(), mask.hard_bias()
        if self._ablation == "none":
            return keep, bias
        if self._ablation in ("zero_ablate", "random_ablate"):
            return ~keep, None if bias is None else ~bias
        path = mask.site.path
        if self._drawn.get(f"{self._ablation}/{path}") is None:
            pool = "all" if self._ablation == "randomly_sampled" else "complement"
            circuit = {path: keep} if bias is None else {path: keep, f"{path}.bias": bias}
            self._drawn[f"{self._ablation}/{path}"] = sample_like(
                circuit, self._generator(torch.device("cpu")), pool=pool
            )
        drawn = self._drawn[f"{self._ablation}/{path}"]
        return ~drawn[path], None if bias is None else ~drawn[f"{path}.bias"]

    def _fresh_weights(self, site: Site) -> Tensor:
        if site.unit == "module":
            raise MaskError("random_ablate draws new weights for units of one tensor; mask_unit='module' has none")
        if site.path not in self._drawn:
            module = self.wrapped_model.get_submodule(site.path)
            self._drawn[site.path] = fresh_weights(module, site, self._generator(torch.device("cpu")))
        return self._drawn[site.path]

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The base model under the current masks, for calls other than forward: ``model.generate`` and the like."""
        with intervened(self.wrapped_model, self.interventions()):
            yield self.wrapped_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the masked model; a loss it returns has the sparsity penalty added (training mode, ``add_l0``)."""
        with self.applied():
            output = self.wrapped_model(*args, **kwargs)
        if not (self.config.add_l0 and self.training):
            return output
        return _with_loss(output, lambda loss: loss + self.config.l0_lambda * self.l0_loss())

    def l0_loss(self) -> Tensor:
        """The differentiable penalty, by ``config.l0_norm``: weights kept, units kept, or the share of units kept."""
        return self.l0(soft=True)

    def l0(self, *, soft: bool = False, norm: str | None = None) -> Tensor:
        """The penalty's value: of the soft masks, or of the binary ones. It does not depend on the ablation mode."""
        norm = norm or self.config.l0_norm
        total, possible = None, 0.0
        for mask in self.each():
            kept, bias = mask.kept(self._temperature, soft)
            scale = mask.site.weights if norm == "paper" else 1
            own = scale * kept.sum() if bias is None else scale * kept.sum() + bias.sum()
            total = own if total is None else total + own
            possible += scale * kept.numel() + (0 if bias is None else bias.numel())
        if total is None:
            return torch.zeros((), device=self._device())
        return total / possible if norm == "mean" else total

    def _device(self) -> torch.device:
        return next((mask.logits.device for mask in self.each()), torch.device("cpu"))

    def compute_l0_statistics(self) -> dict[str, Any]:
        """Weights in the binary circuit: ``total_l0``, ``max_l0``, ``layer2l0``, ``layer2maxl0``.

        A unit counts all its weights: one neuron of a Linear(10, 20) less takes 200 to 190.
        """
        kept, most = {}, {}
        for mask in self.each():
            units, bias = mask.hard(), mask.hard_bias()
            path = mask.site.path
            kept[path] = int(units.sum()) * mask.site.weights + (0 if bias is None else int(bias.sum()))
            most[path] = units.numel() * mask.site.weights + (0 if bias is None else bias.numel())
        return {"total_l0": sum(kept.values()), "max_l0": sum(most.values()), "layer2l0": kept, "layer2maxl0": most}

    def undecided(self, low: float = 0.1, high: float = 0.9) -> float:
        """The share of units whose soft mask lies strictly between: a stopping rule for annealed training."""
        between = total = 0
        for mask in self.each():
            soft = mask.rule.kept(mask.logits.detach(), self._temperature)
            between += int(((soft > low) & (soft < high)).sum())
            total += soft.numel()
        return between / total if total else 0.0

    def threshold_to(self, share: float) -> None:
        """Shift all logits by one constant so that exactly this share of units is kept, biases not counted.

        Of units with equal logits at the threshold, the first ones are kept.
        """
        logits = torch.cat([mask.logits.detach().flatten() for mask in self.each()])
        kept = round(share * logits.numel())
        order = logits.argsort(descending=True, stable=True)
        ranked = logits[order]
        ends = torch.cat([ranked[:1] + 1, ranked, ranked[-1:] - 1])
        shifted = logits - (ends[kept] + ends[kept + 1]) / 2
        # Ties, and neighbours whose middle is one of them, would fall on one side together.
        inside, outside = order[:kept], order[kept:]
        shifted[inside] = shifted[inside].clamp(min=torch.finfo(shifted.dtype).tiny)
        shifted[outside] = shifted[outside].clamp(max=0)
        with torch.no_grad():
            for mask, part in zip(self.each(), shifted.split([mask.logits.numel() for mask in self.each()])):
                mask.logits.copy_(part.view_as(mask.logits))

    def masks(self, **info: Any) -> Masks:
        """The binary circuit as an artefact, whatever the ablation mode."""
        each = list(self.each())
        sites = {mask.site.path: mask.site for mask in each}
        biases = {mask.site.path: mask.hard_bias() for mask in each}
        return Masks(
            sites,
            {mask.site.path: mask.hard() for mask in each},
            {path: bias for path, bias in biases.items() if bias is not None},
            {mask.site.path: mask.logits.detach().clone() for mask in each},
            {"config": self.config.to_dict(), "temperature": self._temperature, **info},
            weights_digest(self.wrapped_model, sites),
        )

    def load_masks(self, masks: Masks, *, same_weights: bool = True) -> None:
        """Take over logits, or ±1 where the artefact has none; the sites must be the same.

        Raises:
            MaskError: masks of another model, or of other sites.
        """
        masks.check(self.wrapped_model, same_weights=same_weights)
        own = {mask.site.path: mask.site for mask in self.each()}
        if own != masks.sites:
            raise MaskError(f"this model masks {', '.join(own)}; the masks are for {', '.join(masks.sites)}")
        own_biases = {mask.site.path for mask in self.each() if mask.bias_logits is not None}
        if own_biases != masks.bias_keep.keys():
            odd = sorted(own_biases ^ masks.bias_keep.keys())[0]
            raise MaskError(f"{odd!r}: the bias is masked in one of the model and the masks, but not in the other")
        with torch.no_grad():
            for mask in self.each():
                path = mask.site.path
                mask.logits.copy_(masks.logits[path] if path in masks.logits else masks.keep[path].float() * 2 - 1)
                if mask.bias_logits is not None:
                    mask.bias_logits.copy_(masks.bias_keep[path].float() * 2 - 1)
        self._drawn.clear()

    def close(self) -> None:
        """Give the base model back its training and gradient flags; of several on one model, the last does.

        Its weights and outputs never changed.
        """
        given_back(self.wrapped_model, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fresh_weights(module: nn.Module, site: Site, generator: torch.Generator) -> Tensor:
    """New initial values for a site's weight, drawn on the CPU: N(0, 0.02) for Conv1D, Kaiming-uniform otherwise."""
    check_plain(site, module, "draw anew")
    name = expert_parameters(module)[0] if site.unit == "expert" else "weight"
    weight = module.get_parameter(name)
    drawn = torch.empty(weight.shape, dtype=torch.float32)
    if isinstance(module, Conv1D):
        nn.init.normal_(drawn, std=0.02, generator=generator)
    else:
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
    return drawn.to(weight.device, weight.dtype)


def _with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with its loss, if it has one, changed: by name, or – ``return_dict=False`` – a first scalar."""
    if isinstance(output, tuple):
        first = output[0] if output else None
        if not isinstance(first, Tensor) or first.ndim or not first.is_floating_point():
            return output
        return (change(first), *output[1:])
    named = isinstance(output, dict)
    loss = output.get("loss") if named else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        output.__setitem__("loss", change(loss)) if named else setattr(output, "loss", change(loss))
    return output
