"""Telling a trainer to say which rows of its dataset a batch has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from attribute._errors import ModelError, RunError
from attribute.training._callback import GradientCollectorCallback

ROW = "trace_row"
T = TypeVar("T")


def prepare_for_gradient_collection(trainer: T) -> T:
    """Number the rows of a trainer's dataset and hand every batch's numbers to its callback.

    Example::

        trainer = prepare_for_gradient_collection(Trainer(model=model, …, callbacks=[GradientCollectorCallback(path)]))
        trainer.train()

    Args:
        trainer: a ``transformers.Trainer`` or TRL's ``SFTTrainer``, with a :class:`GradientCollectorCallback`.

    Returns:
        The trainer, whose dataset, collator and training step are wrapped.

    Raises:
        RunError: it has no such callback.
        ModelError: a training whose rows cannot be told apart: streamed or packed data, several processes, DeepSpeed.
    """
    given: Any = trainer
    callback = next(
        (each for each in given.callback_handler.callbacks if isinstance(each, GradientCollectorCallback)), None
    )
    if callback is None:
        raise RunError("the trainer has no GradientCollectorCallback: pass one in callbacks=[…]")
    _require_supported(given)
    if callback.prepared:
        return trainer
    dataset = given.train_dataset
    callback.attach(_records(dataset), len(dataset))
    given.train_dataset = _numbered(dataset)
    given._set_signature_columns_if_needed()
    given._signature_columns = [*given._signature_columns, ROW]  # or it would be removed as unknown to the model
    given.data_collator = _Collator(given.data_collator)
    _wrap_step(given, callback)
    return trainer


def _require_supported(trainer: Any) -> None:
    arguments = trainer.args
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        raise ModelError("a streamed training set has no row numbers: load it whole")
    for refused, what in (
        (arguments.world_size > 1 or arguments.n_gpu > 1, "several processes or GPUs"),
        (getattr(arguments, "packing", False), "packing, which joins rows"),
        (getattr(arguments, "padding_free", False), "padding-free batches, which join rows"),
        (bool(arguments.deepspeed), "DeepSpeed"),
        (arguments.label_smoothing_factor, "label smoothing"),
        (trainer.compute_loss_func is not None, "a loss function of its own"),
    ):
        if refused:
            raise ModelError(f"gradients of rows are not collected with {what}")


def _wrap_step(trainer: Any, callback: GradientCollectorCallback) -> None:
    step: Callable[..., Tensor] = trainer.training_step
    compute_loss: Callable[..., Any] = trainer.compute_loss
    at_work: dict[str, Tensor] = {}

    def training_step(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        rows = inputs.pop(ROW).cpu().numpy().astype(np.int64)
        if "labels" not in inputs:
            raise ModelError("the batches have no labels: the data collator must make them (language modelling)")
        at_work["labels"] = inputs["labels"]
        callback.begin_step()
        try:
            loss = step(model, inputs, num_items_in_batch)
        except BaseException:
            callback.abort_step()
            raise
        state = trainer.state
        callback.end_step(
            rows, at_work.pop("labels"), state.epoch or 0.0, state.global_step, trainer._get_learning_rate()
        )
        return loss

    def loss_of(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **options: Any
    ) -> Any:
        inputs.pop(ROW, None)
        found = compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **options
        )
        if "labels" in at_work:
            loss = found[0] if return_outputs else found
            items = num_items_in_batch if trainer.model_accepts_loss_kwargs else None
            callback.scale(loss, at_work["labels"], items)
        return found

    trainer.training_step, trainer.compute_loss = training_step, loss_of


class _Collator:
    """The trainer's collator, with the row numbers carried past it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        plain = [{name: value for name, value in each.items() if name != ROW} for each in features]
        batch = dict(self._inner(plain))
        if all(ROW in each for each in features):  # evaluation sets are not numbered
            batch[ROW] = torch.tensor([int(each[ROW]) for each in features])
        return batch


class _Numbered:
    """A dataset whose items say their number."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._dataset[index], ROW: index}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


def _numbered(dataset: Any) -> Any:
    if hasattr(dataset, "add_column"):
        return dataset.add_column(ROW, list(range(len(dataset))))
    return _Numbered(dataset)


def _records(dataset: Any) -> Any:
    """The rows of a ``datasets.Dataset``, as plain values; other datasets may hold anything and are not kept."""
    return dataset.with_format(None) if hasattr(dataset, "with_format") else None
