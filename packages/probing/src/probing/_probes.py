"""CircuitProbe and SubnetworkProbe: masks trained so that one readout tells a variable's values apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from probing._circuit import CircuitModel
from probing._configs import CircuitProbeConfig, SubnetworkProbeConfig
from probing._data import check_attended, select_labels
from probing._errors import DataError, SiteError
from probing._losses import soft_nearest_neighbour
from probing._readout import Readout, ResidualUpdateModel, unwrap
from probing._structure import example_inputs

_C = TypeVar("_C", CircuitProbeConfig, SubnetworkProbeConfig)


@dataclass
class ProbeOutput(SequenceClassifierOutput):
    """transformers' classifier output; ``hidden_states`` are the probed vectors [R, d], ``labels`` theirs [R]."""

    labels: torch.LongTensor | None = None


class _Probe(nn.Module, Generic[_C]):
    """A readout of a masked model: base model ← `CircuitModel` ← `ResidualUpdateModel` ← probe."""

    def __init__(self, config: _C, model: nn.Module, example: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        circuit = CircuitModel(config.circuit_config, model)
        try:
            self.wrapped_model = ResidualUpdateModel(config.resid_config, circuit, example)
            self.readout = Readout.parse(config.probe_vectors)
            self._check_reach(example)
        except BaseException:  # nobody would have anything to close
            circuit.close()
            raise

    def _check_reach(self, example: Mapping[str, Any] | None) -> None:
        """A mask that no gradient of the readout reaches would follow the penalty alone."""
        circuit = self.circuit
        masks = {mask.site.path: mask.logits for mask in circuit.each() if mask.logits.requires_grad}
        if not masks:
            self.train(circuit.training)
            return
        was_training, mode = circuit.training, circuit.ablation
        random = circuit.random_state()
        self.train()
        circuit.set_ablate_mode("none")
        try:
            with torch.enable_grad():
                self.wrapped_model(**(example if example is not None else example_inputs(self.base)))
            found = self.wrapped_model.vector_cache.get(self.config.probe_vectors)
        finally:
            circuit.set_ablate_mode(mode)
            circuit.restore_random_state(random)
            self.wrapped_model.vector_cache = {}
            self.train(was_training)
        if found is None or not found.requires_grad:
            gradients: tuple[Tensor | None, ...] = (None,) * len(masks)
        else:
            gradients = torch.autograd.grad(found.sum(), list(masks.values()), allow_unused=True)
        behind = [path for path, gradient in zip(masks, gradients) if gradient is None]
        if behind:
            raise SiteError(
                f"nothing that {behind[0]!r} computes reaches the readout {self.config.probe_vectors!r}: it lies "
                "behind or beside it, so its mask would never see a gradient; unmask it, or probe a later readout"
            )

    @property
    def circuit(self) -> CircuitModel:
        """The masks."""
        return cast("CircuitModel", self.wrapped_model.wrapped_model)

    @property
    def base(self) -> nn.Module:
        """The model probed."""
        return unwrap(self)

    def close(self) -> None:
        """Give the base model back its training and gradient flags."""
        self.circuit.close()

    def check(self, token_mask: Tensor, inputs: Mapping[str, Any]) -> None:
        """Refuse positions that the probed stack does not have, or that are padding there."""
        layout = next(entry for entry in self.wrapped_model.layouts if entry.index == self.readout.layer)
        check_attended(token_mask, inputs, layout.path)

    def vectors(self, token_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The readout at the probed positions, [R, d] ([R, heads·head_dim] for head outputs), row by row."""
        self.check(token_mask, kwargs)
        self.wrapped_model(*args, **kwargs)
        found = self.wrapped_model.vector_cache[self.config.probe_vectors]
        if found.shape[:2] != token_mask.shape:
            raise DataError(
                f"token_mask is {tuple(token_mask.shape)}, but {self.config.probe_vectors!r} has rows and positions "
                f"{tuple(found.shape[:2])}"
            )
        return found[token_mask].flatten(1)

    def loss(self, vectors: Tensor, labels: Tensor, full: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Loss on probed vectors without the sparsity penalty, and logits if the probe makes any."""
        raise NotImplementedError

    def penalty(self) -> Tensor | float:
        """λ·L0 in training mode, if asked for; nothing in eval mode."""
        config = self.config.circuit_config
        return config.l0_lambda * self.circuit.l0_loss() if config.add_l0 and self.training else 0.0


class CircuitProbe(_Probe[CircuitProbeConfig]):
    """Circuit probing (Lepori et al. 2024): the smallest subnetwork whose readout clusters by the variable's value.

    >>> probe = CircuitProbe(config, model)  # doctest: +SKIP
    >>> output = probe.train()(input_ids=ids, labels=labels, token_mask=last)  # doctest: +SKIP
    >>> output.loss.backward()  # doctest: +SKIP

    `fit` trains it on cached prefixes; `knn_accuracy` says how well the result clusters.

    Raises:
        ConfigError: ``probe_vectors`` that ``resid_config`` does not remember.
        ReadoutError, SiteError: readouts or sites the model lacks.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        token_mask: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> ProbeOutput | tuple[Any, ...]:
        """Loss of one batch.

        Args:
            input_ids: [rows, positions], or whatever the model's main input is (pixels).
            labels: one per probed position; [rows], or [rows, …] padded with negative numbers. Without labels there is
                no loss.
            token_mask: boolean [rows, positions].
            return_dict: a `ProbeOutput`, or the tuple (loss, vectors).
            **kwargs: passed to the model.
        """
        if token_mask is None:
            raise DataError("token_mask is missing: a boolean [rows, positions] of the positions to probe")
        if input_ids is not None:
            kwargs[getattr(self.base, "main_input_name", "input_ids")] = input_ids
        full = None
        if self.config.loss == "linear" and labels is not None:
            full = self._full_vectors(token_mask, **kwargs)
        vectors = self.vectors(token_mask, **kwargs)
        loss = None
        if labels is not None:
            labels = select_labels(labels, token_mask)  # of one class, as a small batch may be: its loss is 0
            loss = self.loss(vectors, labels, full)[0] + self.penalty()
        if not return_dict:
            return (vectors,) if loss is None else (loss, vectors)
        return ProbeOutput(loss=loss, hidden_states=vectors, labels=labels)  # type: ignore[arg-type]

    def loss(self, vectors: Tensor, labels: Tensor, full: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Soft nearest neighbours among the vectors, or (``"linear"``) between them and the full model's."""
        return soft_nearest_neighbour(vectors, labels, full if self.config.loss == "linear" else None), None

    @torch.no_grad()
    def _full_vectors(self, token_mask: Tensor, **kwargs: Any) -> Tensor:
        masks = list(self.circuit.each())
        active = [mask.active for mask in masks]
        self.circuit.use_masks(False)
        try:
            return self.vectors(token_mask, **kwargs)
        finally:
            for mask, was in zip(masks, active):
                mask.active = was


class SubnetworkProbe(_Probe[SubnetworkProbeConfig]):
    """Subnetwork probing (Cao et al. 2021): a mask and a classifier trained together.

    >>> probe = SubnetworkProbe(config, model)  # doctest: +SKIP
    >>> probe(ids, labels, token_mask).logits.shape  # doctest: +SKIP
    torch.Size([32, 5])

    The sparsity penalty is part of the loss (in the package this one succeeds it never was). With no target layers this
    is an ordinary linear or MLP probe.
    """

    def __init__(
        self, config: SubnetworkProbeConfig, model: nn.Module, example: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(config, model, example)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.circuit_config.seed)
            self.probe = _head(self._width(), config.intermediate_size, config.n_classes)
        first = next(self.base.parameters())
        self.probe.to(first.device)

    def _width(self) -> int:
        layout = next(entry for entry in self.wrapped_model.layouts if entry.index == self.readout.layer)
        if self.readout.kind == "head_output":
            module = self.base.get_submodule(str(layout.projection))
            return module.in_features if isinstance(module, nn.Linear) else cast("Tensor", module.weight).shape[0]
        return layout.width

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        token_mask: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> ProbeOutput | tuple[Any, ...]:
        """Logits, and with labels the loss; arguments as in `CircuitProbe`, the tuple is (loss, logits, vectors)."""
        if token_mask is None:
            raise DataError("token_mask is missing: a boolean [rows, positions] of the positions to probe")
        if self.config.labeling == "sequence" and not bool((token_mask.sum(1) == 1).all()):
            row = int((token_mask.sum(1) != 1).nonzero()[0])
            raise DataError(
                f"labeling='sequence' probes one position a row, but token_mask selects {int(token_mask[row].sum())} "
                f"in row {row}; use labeling='token'"
            )
        if input_ids is not None:
            kwargs[getattr(self.base, "main_input_name", "input_ids")] = input_ids
        vectors = self.vectors(token_mask, **kwargs)
        logits, loss = self.probe(vectors.to(next(self.probe.parameters()).dtype)), None
        if labels is not None:
            labels = select_labels(labels, token_mask)
            self._check_classes(labels)
            loss = nn.functional.cross_entropy(logits, labels) + self.penalty()
        output = ProbeOutput(loss=loss, logits=logits, hidden_states=vectors, labels=labels)  # type: ignore[arg-type]
        return output if return_dict else tuple(v for v in (loss, logits, vectors) if v is not None)

    def loss(self, vectors: Tensor, labels: Tensor, full: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of the classifier."""
        self._check_classes(labels)
        logits = self.probe(vectors.to(next(self.probe.parameters()).dtype))
        return nn.functional.cross_entropy(logits, labels), logits

    def _check_classes(self, labels: Tensor) -> None:
        if int(labels.max()) >= self.config.n_classes:
            raise DataError(f"label {int(labels.max())} is out of range for n_classes={self.config.n_classes}")


def _head(width: int, hidden: int, classes: int) -> nn.Module:
    if hidden == -1:
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
