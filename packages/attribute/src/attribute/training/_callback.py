"""``GradientCollectorCallback``: hooks of a collector around each training step of a Hugging Face trainer.

The gradient of every row is taken from the backward pass that trains the model. What a row is, and what its gradient is
multiplied with, the trainer's kind says: ``_labelled`` for rows of a dataset, ``_sampled`` for completions.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from attribute._adapters import has_adapters, output_modules, transformer_of
from attribute._errors import ModelError, RunError
from attribute.training._batch import Batch, RowKind
from attribute.training._live_moments import HeldStep
from attribute.training._run import ORDER, WHOLE, Run
from gradcore import MATRICES, CapturePlan, GradientCollector, Identity, Sketch, TwoSided
from gradcore.layers import layer_for

_STATE = "trace"
"""Where the trainer's state, and so each checkpoint, says of which run it is."""

_logger = logging.getLogger(__name__)


class GradientCollectorCallback(TrainerCallback):
    """Store the gradient of every training row of every epoch, collected while the model trains.

    Example::

        callback = GradientCollectorCallback(path="runs/example", track_order=True)
        trainer = Trainer(model=model, args=training_args, train_dataset=dataset, callbacks=[callback])
        trainer = prepare_for_gradient_collection(trainer)
        trainer.train()
        GradientStore.open("runs/example/train/epoch_0").block(0, 10)      # [10, width], in the order of the dataset

    The training is the one that would have been: weights, optimiser and random numbers are not touched. Rows of an
    epoch are written to ``path/train/epoch_N`` when it ends; a training that is resumed from a checkpoint has the rows
    of one that was never stopped. Of a ``GRPOTrainer`` a row is a completion in an optimiser step, in the order of the
    training.

    Args:
        path: the folder of the run.
        projection_dim: side of the two-sided sketch; 0 keeps whole gradients.
        sketch: another sketch of gradcore's instead (not a spectral one, whose basis would be that of the first step).
        modules: patterns of modules; by default all linear layers that are trained, with LoRA the adapters'.
        include_bias: capture biases too.
        track_order: also write ``path/order.jsonl``: a line a row and step, ``{"row", "step", "epoch"}``, and
            ``"generation"`` where rows are completions.
        scale_by_lr: multiply each row by the learning rate of its step, as TracIn weighs it.
        reduction: ``"sum"`` or ``"mean"`` over a row's labelled tokens.
        normalizer: ``"adam"`` multiplies every gradient with ``1 / (√v̂ + ε)`` before it is sketched, ``v̂`` being the
            optimiser's second moments after the row's own step. The factors of a step's rows are held until then.

    Raises:
        RunError: the path holds rows that this training does not go on with; the trainer was not prepared; an unknown
            normaliser.
        ModelError: more than one process, packing, or another loss than cross-entropy over labels.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        projection_dim: int = 16,
        sketch: Sketch | None = None,
        modules: str | Sequence[str] | None = None,
        include_bias: bool = False,
        track_order: bool = False,
        scale_by_lr: bool = False,
        reduction: str = "sum",
        normalizer: str | None = None,
    ) -> None:
        if normalizer not in (None, "adam"):
            raise RunError(f"the normaliser of a training is 'adam' or None, not {normalizer!r}")
        self.path = Path(path)
        self.sketch = sketch or TwoSided(projection_dim) if sketch or projection_dim else None
        self.modules, self.include_bias = modules, include_bias
        self.track_order, self.scale_by_lr, self.reduction = track_order, scale_by_lr, reduction
        self.normalizer = normalizer
        self._kind: RowKind | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._collector: GradientCollector | None = None
        self._held: HeldStep | None = None
        self._run: Run | None = None
        self._plan: CapturePlan | None = None
        self._silent: dict[str, nn.Parameter] = {}

    def plan(self, model: nn.Module) -> CapturePlan:
        """What is captured of a model that is about to be trained, its modules named as an index names them."""
        base, outside = _parts(model)
        chosen = self.modules if self.modules is not None else _trained({**dict(base.named_modules()), **outside})
        return CapturePlan.for_model(
            base,
            chosen,
            sketch=self.sketch,
            reduction=self.reduction,
            include_bias=self.include_bias,
            outside=outside,
        )

    @property
    def prepared(self) -> bool:
        """Whether a trainer says which rows a batch has."""
        return self._kind is not None

    def belongs_to(self, trainer: Any) -> bool:
        """Whether it is this trainer that says it."""
        return self._trainer is not None and self._trainer() is trainer

    def attach(self, trainer: Any, kind: RowKind) -> None:
        """What the rows of a trainer are; :meth:`receive` is then called for every batch."""
        self._trainer, self._kind = weakref.ref(trainer), kind

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find what a resumed training goes on with, and set the hooks, which pass everything until a step begins."""
        if self._kind is None:
            raise RunError("the trainer does not say which rows a batch has: prepare_for_gradient_collection(trainer)")
        self._leave()  # a training that failed never came to its end
        plan = self._plan = self.plan(model)
        if state.global_step and args.ignore_data_skip and abs(state.epoch - round(state.epoch)) > WHOLE:
            raise ModelError(
                "ignore_data_skip=True begins an epoch anew from its middle, so that its rows cannot be told from "
                "those of the next: leave it False, or resume from a checkpoint at the end of an epoch"
            )
        self._run = Run(self.path, plan, self._kind, {**self._options(), "track_order": self.track_order})
        claimed = state.stateful_callbacks.get(_STATE, {}).get("run")
        run = self._run.begin(state.global_step, state.epoch or 0.0, claimed, self._meta)
        state.stateful_callbacks[_STATE] = {"run": run}
        base, outside = _parts(model)
        if self.normalizer is None:
            self._collector = GradientCollector(base, plan, freeze=False, outside=outside)
        else:
            self._held = HeldStep(plan)
            whole = replace(plan, sketch=Identity())
            self._collector = GradientCollector(base, whole, factors=self._held.receive, freeze=False, outside=outside)
        self._collector.enabled = False
        self._collector.__enter__()
        self._silent = _weights({**dict(base.named_modules()), **outside}, plan)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """The optimiser knows its second moments: rows that were held for them are stored."""
        if self._held is not None:
            skipped = getattr(optimizer, "step_was_skipped", False)  # its rows are zero, whatever the weights have
            base, outside = _parts(model)
            for batch, gradients in self._held.rows(base, optimizer, outside):
                self._store(batch, gradients * batch.scale, seen=not skipped)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks away. An epoch that the last step ends early is written, one that was stopped is kept."""
        self._leave()
        if self._run is not None and state.global_step >= state.max_steps:
            for number in self._run.unfinished():
                self._run.finish(number, self._meta(state.epoch))
        self._run = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the epoch's store, if the epoch is whole."""
        if self._run is not None and abs(state.epoch - round(state.epoch)) < WHOLE:
            self._run.finish(round(state.epoch) - 1, self._meta(state.epoch))

    @contextmanager
    def backward_pass(self) -> Generator[None]:
        """Around a forward and backward pass that trains: its gradients are collected, unless it fails."""
        assert self._collector is not None
        self._collector.enabled = True
        try:
            yield
        except BaseException:
            if self._held is not None:
                self._held.forget()
            raise
        finally:
            self._collector.enabled = False

    def receive(self, batch: Batch) -> None:
        """A backward pass is over: its rows are stored, or held until the optimiser's step."""
        assert self._collector is not None
        if self._held is not None:
            self._held.close(batch)
            return
        gradients = self._collector.take().float()
        if len(gradients) != len(batch.rows):
            raise ModelError(
                f"a batch of {len(batch.rows)} rows gave {len(gradients)} gradients: rows that are packed or repeated "
                "cannot be told apart"
            )
        scale = batch.scale.to(gradients.device) if isinstance(batch.scale, Tensor) else batch.scale
        self._store(batch, gradients * scale)

    def _store(self, batch: Batch, gradients: Tensor, *, seen: bool = True) -> None:
        if seen:
            self._require_seen(gradients)
        finite = gradients.isfinite().all(1)
        if not finite.all():
            # Loss scaling of float16 looks for its scale by overflowing; such a step changes no weight.
            gradients = torch.where(finite[:, None], gradients, 0)
            _logger.warning(
                "step %d: gradients of rows %s are not finite and are stored as zeros; but for the first steps of "
                "float16 look for an exploding loss",
                batch.step,
                batch.rows[~finite.cpu().numpy()].tolist(),
            )
        if self.scale_by_lr:
            gradients *= batch.rate
        number = int(batch.epoch + WHOLE)
        assert self._kind is not None
        assert self._run is not None
        self._run.put(number, self._kind.lines(batch), gradients.cpu().numpy())
        if self.track_order:
            with (self.path / ORDER).open("a", encoding="utf-8") as stream:
                for place, row in enumerate(batch.rows):
                    line = {"row": int(row), "step": batch.step, "epoch": number}
                    if batch.completions:
                        line["generation"] = batch.completions[place].generation
                    stream.write(json.dumps(line) + "\n")

    def _require_seen(self, gradients: Tensor) -> None:
        """Every module has rows before its weight has a gradient: one that something runs past its forward has none."""
        assert self._plan is not None
        for name, weight in list(self._silent.items()):
            if gradients[:, self._plan.slices[name]].any():
                del self._silent[name]
            elif weight.grad is not None and weight.grad.any() and weight.grad.isfinite().all():
                raise ModelError(
                    f"{name} learns, but its forward is never called, so that no row can be seen: a fused output "
                    "embedding or kernel uses its weight itself. Leave it out with modules=…"
                )

    def _options(self) -> dict[str, Any]:
        """What a row's numbers depend on, beside the plan."""
        options: dict[str, Any] = {"reduction": self.reduction, "scale_by_lr": self.scale_by_lr}
        return options if self.normalizer is None else {**options, "normalizer": self.normalizer}

    def _meta(self, epochs: float) -> dict[str, Any]:
        return {"training": {**self._options(), "epochs": epochs}, "sign": "positive scores are proponents"}

    def _leave(self) -> None:
        """Take the hooks away."""
        if self._collector is not None:
            self._collector.__exit__(None, None, None)
        self._collector = self._held = None


def _parts(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The transformer, and what else rows can be of: with PEFT, where it is trained by choice, the output embedding."""
    return transformer_of(model), output_modules(model) if has_adapters(model) else {}


def _trained(modules: Mapping[str, nn.Module]) -> list[str]:
    """The linear layers with a parameter that is trained."""
    found = [
        name
        for name, module in modules.items()
        if (layer := layer_for(module)) is not None
        and layer.kind in MATRICES
        and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    if not found:
        raise ModelError("no linear layer of the model is trained: name them in modules=…, or unfreeze some")
    return found


def _weights(modules: Mapping[str, nn.Module], plan: CapturePlan) -> dict[str, nn.Parameter]:
    """The weights of the modules that have columns of their own in the rows."""
    if plan.sketch.summed:
        return {}
    found = {each.name: getattr(modules[each.path], "weight", None) for each in plan.modules}
    return {name: weight for name, weight in found.items() if isinstance(weight, nn.Parameter)}
