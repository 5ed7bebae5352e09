"""Masks as artefacts: boolean tensors in safetensors, what they mean in JSON, and the algebra of sets between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probing._errors import MaskError, SiteError
from probing._intervene import Intervention, intervened
from probing._sites import Site, find_sites, has_plain_weight
from probing._tensors import model_device

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Masks:
    """Which units of which sites belong to a circuit; True is kept.

    >>> a = Masks.of(model, {"transformer.h.0.mlp.c_fc": keep}, unit="neuron")  # doctest: +SKIP
    >>> a.save("a_squared.safetensors")  # doctest: +SKIP
    >>> both, only_a, rest = a & b, a - b, ~a  # doctest: +SKIP
    >>> with both.applied(model):  # doctest: +SKIP
    ...     model(input_ids)

    Attributes:
        sites: the masked modules, by path.
        keep: one boolean tensor per site.
        bias_keep: the same for biases that have masks of their own.
        logits: the trained logits, where the masks come from training; set algebra drops them.
        info: how the masks were made: rule, λ, seed, metrics, whatever the maker wrote.
    """

    sites: dict[str, Site]
    keep: dict[str, Tensor]
    bias_keep: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    """A digest of the masked modules' weights: the masks of one trained model say nothing about another."""

    @classmethod
    def of(cls, model: nn.Module, keep: Mapping[str, Tensor], unit: str = "neuron", **info: Any) -> Masks:
        """Masks written by hand.

        Raises:
            SiteError: a path that names no site.
            MaskError: a mask whose shape is not its site's.
        """
        sites = {site.path: site for site in find_sites(model, list(keep), unit)}
        if odd := sorted(sites.keys() ^ keep.keys()):
            raise SiteError(f"{odd[0]!r} is not both a mask's name and a module's: name each module's path in full")
        for path, site in sites.items():
            if tuple(keep[path].shape) != site.shape:
                raise MaskError(f"{path!r}: the mask has shape {tuple(keep[path].shape)}, the site {site.shape}")
        kept = {path: keep[path].bool() for path in sites}
        return cls(sites, kept, info=info, weights=weights_digest(model, sites))

    @property
    def size(self) -> int:
        """How many units are kept, biases not counted."""
        return sum(int(mask.sum()) for mask in self.keep.values())

    @property
    def total(self) -> int:
        """How many units there are."""
        return sum(mask.numel() for mask in self.keep.values())

    @property
    def share(self) -> float:
        """``size / total``."""
        return self.size / self.total

    def __and__(self, other: Masks) -> Masks:
        """Units in both."""
        return self._combine(other, torch.logical_and)

    def __or__(self, other: Masks) -> Masks:
        """Units in either."""
        return self._combine(other, torch.logical_or)

    def __xor__(self, other: Masks) -> Masks:
        """Units in exactly one."""
        return self._combine(other, torch.logical_xor)

    def __sub__(self, other: Masks) -> Masks:
        """Units here but not there."""
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> Masks:
        """The complement, site by site."""
        flip = lambda masks: {path: ~mask for path, mask in masks.items()}  # noqa: E731
        return replace(self, keep=flip(self.keep), bias_keep=flip(self.bias_keep), logits={}, info={})

    def equals(self, other: Masks) -> bool:
        """Whether both keep the same units of the same sites."""
        return self.sites == other.sites and all(torch.equal(self.keep[p], other.keep[p]) for p in self.keep)

    def _combine(self, other: Masks, operation: Any) -> Masks:
        if self.sites != other.sites:
            odd = sorted(set(self.sites) ^ set(other.sites)) or [
                p for p in self.sites if self.sites[p] != other.sites[p]
            ]
            raise MaskError(
                f"the two circuits live on different sites ({', '.join(odd[:3])}); mask the same sites in both"
            )
        if self.weights and other.weights and self.weights != other.weights:
            raise MaskError("the two circuits were found in models with different weights, so their units do not match")
        bias = self.bias_keep.keys() & other.bias_keep.keys()
        return replace(
            self,
            keep={path: operation(self.keep[path], other.keep[path]) for path in self.keep},
            bias_keep={path: operation(self.bias_keep[path], other.bias_keep[path]) for path in sorted(bias)},
            logits={},
            info={},
        )

    def check(self, model: nn.Module, *, same_weights: bool = True) -> None:
        """Refuse a model these masks were not made for.

        Raises:
            MaskError: a site is absent, has another shape, or (unless waived) other weights.
        """
        for path, site in self.sites.items():
            try:
                found = find_sites(model, path, site.unit)[0]
            except SiteError as error:
                raise MaskError(f"masks of another model: {error}") from None
            if found != site:
                raise MaskError(
                    f"masks of another model: {path!r} has shape {found.shape} here, {site.shape} in the masks"
                )
        if same_weights and self.weights and weights_digest(model, self.sites) != self.weights:
            raise MaskError(
                "masks of another model: the shapes agree but the weights do not. To try a circuit on other weights on "
                "purpose, pass same_weights=False"
            )

    @contextmanager
    def applied(self, model: nn.Module, *, same_weights: bool = True) -> Iterator[nn.Module]:
        """The model computing with kept units only (removed ones give zero); itself again on exit."""
        self.check(model, same_weights=same_weights)
        with intervened(model, self.interventions(model)):
            yield model

    def interventions(self, model: nn.Module) -> list[Intervention]:
        """Zero ablation of everything outside the circuit, on the model's devices."""
        device = {path: model_device(model.get_submodule(path)) for path in self.sites}
        return [
            Intervention(
                site,
                self.keep[path].to(device[path], torch.float32),
                self.bias_keep[path].to(device[path], torch.float32) if path in self.bias_keep else None,
            )
            for path, site in self.sites.items()
        ]

    def save(self, path: str | Path) -> None:
        """Write ``<name>.safetensors`` (masks and logits) and ``<name>.json`` (what they mean)."""
        path = _file(path)
        tensors = {f"keep/{name}": mask for name, mask in self.keep.items()}
        tensors |= {f"bias/{name}": mask for name, mask in self.bias_keep.items()}
        tensors |= {f"logits/{name}": logits for name, logits in self.logits.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        described = {
            "format": FORMAT,
            "weights": self.weights,
            "size": self.size,
            "total": self.total,
            "sites": {name: {**vars(site), "shape": list(site.shape)} for name, site in self.sites.items()},
            "info": self.info,
        }
        described["tensors"] = _digest(tensors)
        try:
            written = json.dumps(described, indent=2) + "\n"
        except TypeError as error:
            raise MaskError(f"info must hold plain values, as JSON has them: {error}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        path.with_suffix(".json").write_text(written, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read what `save` wrote.

        Raises:
            MaskError: a file is absent, torn, from another version, or does not belong to its partner.
        """
        path = _file(path)
        try:
            described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            tensors = load_file(path)
        except FileNotFoundError as error:
            raise MaskError(
                f"{error.filename or path}: no such file; masks are a .safetensors and a .json side by side"
            ) from None
        except (json.JSONDecodeError, SafetensorError) as error:
            raise MaskError(f"{path}: not readable as masks ({error}); the file is damaged") from None
        if described.get("format") != FORMAT:
            raise MaskError(f"{path}: mask format {described.get('format')!r}, but this version reads format {FORMAT}")
        if described["tensors"] != _digest(tensors):
            raise MaskError(f"{path}: the tensors are not those its .json describes; one of the two files was replaced")
        groups: dict[str, dict[str, Tensor]] = {"keep": {}, "bias": {}, "logits": {}}
        for name, tensor in tensors.items():
            kind, _, site = name.partition("/")
            groups[kind][site] = tensor
        sites = {name: Site(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in described["sites"].items()}
        keep = {name: groups["keep"][name] for name in sites}
        logits = {name: groups["logits"][name] for name in sites if name in groups["logits"]}
        return cls(sites, keep, groups["bias"], logits, described["info"], described["weights"])


def overlap(a: Masks, b: Masks) -> dict[str, float]:
    """Jaccard index of two circuits over all units, and what independent circuits of these sizes would have.

    Two empty circuits are the same: 1, and so by chance.

    >>> overlap(a, b)["jaccard"]  # doctest: +SKIP
    0.81
    """
    both, either = (a & b).size, (a | b).size
    # Independence within each site: expected intersection |A||B|/n, expected union by inclusion-exclusion.
    expected = sum(float(a.keep[p].sum()) * float(b.keep[p].sum()) / a.keep[p].numel() for p in a.keep)
    union = a.size + b.size - expected
    return {
        "jaccard": both / either if either else 1.0,
        "jaccard_if_independent": expected / union if union else 1.0,
        "intersection": float(both),
        "union": float(either),
    }


def weights_digest(model: nn.Module, sites: Mapping[str, Site]) -> str:
    """SHA-256 over the masked modules' weights, in order of path."""
    digest = hashlib.sha256()
    for path in sorted(sites):
        module = model.get_submodule(path)
        # Buffers where there is no plain weight: quantised layers keep their numbers there.
        tensors = module.state_dict() if not has_plain_weight(module) else dict(module.named_parameters())
        for name, parameter in sorted(tensors.items()):
            digest.update(f"{path}.{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            if not isinstance(parameter, Tensor):
                continue
            raw = parameter.detach().cpu().contiguous().view(torch.uint8)
            digest.update(cast("Any", raw.numpy()).tobytes())
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
