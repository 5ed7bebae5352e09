"""``GradientCollectorCallback``: hooks of a collector around each training step of a Hugging Face trainer.

The gradient of every row is taken from the backward pass that trains the model. What a row is, and what its gradient is
multiplied with, the trainer's kind says: ``_labelled`` for rows of a dataset, ``_sampled`` for completions.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from attribute._errors import ModelError, RunError
from attribute.training._batch import Batch, EpochRecord, OpenEpoch
from attribute.training._live_moments import HeldStep
from gradcore import MATRICES, CapturePlan, GradientCollector, Identity, Sketch, TwoSided
from gradcore.layers import layer_for

ORDER = "order.jsonl"
_WHOLE = 1e-6  # the trainer counts epochs in fractions of a step


class GradientCollectorCallback(TrainerCallback):
    """Store the gradient of every training row of every epoch, collected while the model trains.

    Example::

        callback = GradientCollectorCallback(path="runs/example", track_order=True)
        trainer = Trainer(model=model, args=training_args, train_dataset=dataset, callbacks=[callback])
        trainer = prepare_for_gradient_collection(trainer)
        trainer.train()
        GradientStore.open("runs/example/train/epoch_0").block(0, 10)      # [10, width], in the order of the dataset

    The training is the one that would have been: weights, optimiser and random numbers are not touched. Rows of an
    epoch are written to ``path/train/epoch_N`` when it ends; a training that is resumed from a checkpoint goes on with
    the rows it had. Of a ``GRPOTrainer`` a row is a completion in an optimiser step, in the order of the training.

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
        RunError: the path holds a finished epoch already; the trainer was not prepared; an unknown normaliser.
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
        self._open_epoch: OpenEpoch | None = None
        self._collector: GradientCollector | None = None
        self._held: HeldStep | None = None
        self._epoch: EpochRecord | None = None
        self._plan: CapturePlan | None = None
        self._silent: dict[str, nn.Parameter] = {}

    def plan(self, model: nn.Module) -> CapturePlan:
        """What is captured of a model that is about to be trained, its modules named as an index names them."""
        model = _root(model)
        if self.modules is not None:
            return CapturePlan.for_model(
                model, self.modules, sketch=self.sketch, reduction=self.reduction, include_bias=self.include_bias
            )
        trained = [
            name
            for name, module in model.named_modules()
            if (layer := layer_for(module)) is not None
            and layer.kind in MATRICES
            and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        ]
        if not trained:
            raise ModelError("no linear layer of the model is trained: name --modules, or unfreeze some")
        return CapturePlan.for_model(
            model, trained, sketch=self.sketch, reduction=self.reduction, include_bias=self.include_bias
        )

    @property
    def prepared(self) -> bool:
        """Whether a trainer says which rows a batch has."""
        return self._open_epoch is not None

    def attach(self, open_epoch: OpenEpoch) -> None:
        """How the rows of an epoch are to be kept; :meth:`receive` is then called for every batch."""
        self._open_epoch = open_epoch

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set the hooks; they let everything pass until a training step begins."""
        if not self.prepared:
            raise RunError("the trainer does not say which rows a batch has: prepare_for_gradient_collection(trainer)")
        plan = self._plan = self.plan(model)
        if self.normalizer is None:
            self._collector = GradientCollector(_root(model), plan, freeze=False)
        else:
            self._held = HeldStep(plan)
            whole = replace(plan, sketch=Identity())
            self._collector = GradientCollector(_root(model), whole, factors=self._held.receive, freeze=False)
        self._collector.enabled = False
        self._collector.__enter__()
        self._silent = _weights(_root(model), plan)
        if self.track_order:
            self.path.mkdir(parents=True, exist_ok=True)
            self._forget_order_after(state.global_step)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """The optimiser knows its second moments: rows that were held for them are stored."""
        if self._held is not None:
            for batch, gradients in self._held.rows(_root(model), optimizer):
                self._store(batch, gradients * batch.scale)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks away. An epoch that the last step ends early is written, one that was stopped is kept."""
        if self._collector is not None:
            self._collector.__exit__(None, None, None)
            self._collector = self._held = None
        if state.global_step >= state.max_steps:
            self._write_epoch(state.epoch)
        self._epoch = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the epoch's store, if the epoch is whole."""
        if abs(state.epoch - round(state.epoch)) < _WHOLE:
            self._write_epoch(state.epoch)

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

    def _store(self, batch: Batch, gradients: Tensor) -> None:
        self._require_seen(gradients)
        if not gradients.isfinite().all():
            # Loss scaling of float16 looks for its scale by overflowing; such a step changes no weight.
            gradients = torch.where(gradients.isfinite().all(1, keepdim=True), gradients, 0)
        if self.scale_by_lr:
            gradients *= batch.rate
        number = int(batch.epoch + _WHOLE)
        if self._epoch is None:
            assert self._open_epoch is not None
            assert self._plan is not None
            self._epoch = self._open_epoch(self.path / "train" / f"epoch_{number}", self._plan, batch.step)
        self._epoch.put(batch, gradients.cpu().numpy())
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

    def _write_epoch(self, epoch: float) -> None:
        if self._epoch is not None:
            about = {"reduction": self.reduction, "scale_by_lr": self.scale_by_lr, "epochs": epoch}
            if self.normalizer is not None:
                about["normalizer"] = self.normalizer
            meta = {"training": about, "sign": "positive scores are proponents"}
            self._epoch.finish(meta)
            self._epoch = None

    def _forget_order_after(self, step: int) -> None:
        """Steps that a resumed training makes again are not listed twice."""
        file = self.path / ORDER
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] < step]
            file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _root(model: nn.Module) -> nn.Module:
    """The model before its output embedding; one that PEFT has wrapped as it is, since it has names of its own."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) and not hasattr(model, "peft_config") else model


def _weights(model: nn.Module, plan: CapturePlan) -> dict[str, nn.Parameter]:
    """The weights of the modules that have columns of their own in the rows."""
    if plan.sketch.summed:
        return {}
    found = {each.name: getattr(model.get_submodule(each.path), "weight", None) for each in plan.modules}
    return {name: weight for name, weight in found.items() if isinstance(weight, nn.Parameter)}
