"""``GradientCollectorCallback``: hooks of a collector around each training step of a Hugging Face trainer.

The gradient of every row is taken from the backward pass that trains the model. The trainer's loss is a mean over the
tokens of an accumulated batch; what is stored is the gradient of a row's own summed loss, whatever the batch it was in,
equal to that of :func:`collect_gradients` at the same parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from attribute._errors import ModelError, RunError
from attribute.training._epoch import EpochRows
from gradcore import IGNORE, MATRICES, CapturePlan, GradientCollector, Sketch, TwoSided
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
    the rows it had.

    Args:
        path: the folder of the run.
        projection_dim: side of the two-sided sketch; 0 keeps whole gradients.
        sketch: another sketch of gradcore's instead (not a spectral one, whose basis would be that of the first step).
        modules: patterns of modules; by default all linear layers that are trained, with LoRA the adapters'.
        include_bias: capture biases too.
        track_order: also write ``path/order.jsonl``: a line a row and step, ``{"row", "step", "epoch"}``.
        scale_by_lr: multiply each row by the learning rate of its step, as TracIn weighs it.
        reduction: ``"sum"`` or ``"mean"`` over a row's labelled tokens.

    Raises:
        RunError: the path holds a finished epoch already; the trainer was not prepared.
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
    ) -> None:
        self.path = Path(path)
        self.sketch = sketch or TwoSided(projection_dim) if sketch or projection_dim else None
        self.modules, self.include_bias = modules, include_bias
        self.track_order, self.scale_by_lr, self.reduction = track_order, scale_by_lr, reduction
        self.prepared = False
        self._collector: GradientCollector | None = None
        self._epoch: EpochRows | None = None
        self._records: Any = None
        self._count = 0
        self._factor = 1.0

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

    def attach(self, records: Any, count: int) -> None:
        """The training rows: their records, where there are some to be shown, and their number."""
        self._records, self._count, self.prepared = records, count, True

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set the hooks; they let everything pass until a training step begins."""
        if not self.prepared:
            raise RunError("the trainer does not say which rows a batch has: prepare_for_gradient_collection(trainer)")
        self._collector = GradientCollector(_root(model), self.plan(model), freeze=False)
        self._collector.enabled = False
        self._collector.__enter__()
        if self.track_order:
            self.path.mkdir(parents=True, exist_ok=True)
            self._forget_order_after(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks away. An epoch that the last step ends early is written, one that was stopped is kept."""
        if self._collector is not None:
            self._collector.__exit__(None, None, None)
            self._collector = None
        if state.global_step >= state.max_steps:
            self._write_epoch(state.epoch)
        self._epoch = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the epoch's store, if the epoch is whole."""
        if abs(state.epoch - round(state.epoch)) < _WHOLE:
            self._write_epoch(state.epoch)

    def begin_step(self) -> None:
        """A training step begins: forward passes count from here."""
        assert self._collector is not None
        self._collector.enabled = True

    def scale(self, loss: Tensor, labels: Tensor, items: Tensor | int | None) -> None:
        """Learn from the loss that is about to be differentiated what a row's own loss was divided by."""
        divisor = float(items) if items is not None else float((labels[:, 1:] != IGNORE).sum())

        def receive(gradient: Tensor) -> None:
            # Accumulation and loss scaling multiply the loss after it was computed.
            self._factor = divisor / float(gradient)

        loss.register_hook(receive)

    def end_step(self, rows: np.ndarray, labels: Tensor, epoch: float, step: int, rate: float) -> None:
        """A training step is over: store its rows."""
        assert self._collector is not None
        self._collector.enabled = False
        gradients = self._collector.take().float() * self._factor
        if len(gradients) != len(rows):
            raise ModelError(
                f"a batch of {len(rows)} rows gave {len(gradients)} gradients: rows that are packed or repeated "
                "cannot be told apart"
            )
        if self.reduction == "mean":
            gradients /= (labels[:, 1:] != IGNORE).sum(1, keepdim=True).clamp(min=1).to(gradients.device)
        if not gradients.isfinite().all():
            # Loss scaling of float16 looks for its scale by overflowing; such a step changes no weight.
            gradients = torch.where(gradients.isfinite().all(1, keepdim=True), gradients, 0)
        if self.scale_by_lr:
            gradients *= rate
        number = int(epoch + _WHOLE)
        if self._epoch is None:
            self._epoch = EpochRows(self.path / "train" / f"epoch_{number}", self._collector.plan, self._count)
        self._epoch.put(rows, gradients.cpu().numpy())
        if self.track_order:
            with (self.path / ORDER).open("a", encoding="utf-8") as stream:
                for row in rows:
                    stream.write(json.dumps({"row": int(row), "step": step, "epoch": number}) + "\n")

    def abort_step(self) -> None:
        """A training step failed: nothing of it counts."""
        if self._collector is not None:
            self._collector.enabled = False

    def _write_epoch(self, epoch: float) -> None:
        if self._epoch is not None:
            about = {"reduction": self.reduction, "scale_by_lr": self.scale_by_lr, "epochs": epoch}
            meta = {"training": about, "sign": "positive scores are proponents"}
            self._epoch.finish(_plain(self._records), meta)
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


def _plain(records: Any) -> Iterable[Mapping[str, Any]] | None:
    """Records as JSON can hold them, without the row numbers."""
    if records is None:
        return None
    return ({name: value for name, value in record.items() if name != "trace_row"} for record in records)
