"""Telling a trainer to say which rows of its dataset a batch has."""

from __future__ import annotations

from typing import Any, TypeVar

from attribute._errors import ModelError, RunError
from attribute.training import _labelled, _sampled
from attribute.training._callback import GradientCollectorCallback

T = TypeVar("T")


def prepare_for_gradient_collection(trainer: T) -> T:
    """Number the rows of a trainer's dataset and hand every batch's numbers to its callback.

    Example::

        trainer = prepare_for_gradient_collection(Trainer(model=model, …, callbacks=[GradientCollectorCallback(path)]))
        trainer.train()

    Args:
        trainer: a ``transformers.Trainer``, TRL's ``SFTTrainer`` or ``GRPOTrainer``, with a
            :class:`GradientCollectorCallback`.

    Returns:
        The trainer, whose dataset, collator or sampling, and training step are wrapped.

    Raises:
        RunError: it has no such callback, or another trainer's.
        ModelError: a training whose rows cannot be told apart: streamed or packed data, several processes, DeepSpeed.
    """
    given: Any = trainer
    callback = next(
        (each for each in given.callback_handler.callbacks if isinstance(each, GradientCollectorCallback)), None
    )
    if callback is None:
        raise RunError("the trainer has no GradientCollectorCallback: pass one in callbacks=[…]")
    _require_supported(given)
    if callback.prepared and not callback.belongs_to(trainer):
        raise RunError("this GradientCollectorCallback belongs to another trainer: give each one of its own")
    if not callback.prepared:
        kind = _sampled if _sampled.samples(given) else _labelled
        kind.prepare(given, callback)
    return trainer


def _require_supported(trainer: Any) -> None:
    arguments = trainer.args
    if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
        raise ModelError("a streamed training set has no row numbers: load it whole")
    for refused, what in (
        (arguments.world_size > 1 or arguments.n_gpu > 1, "several processes or GPUs"),
        (bool(arguments.deepspeed), "DeepSpeed"),
        (trainer.compute_loss_func is not None, "a loss function of its own"),
    ):
        if refused:
            raise ModelError(f"gradients of rows are not collected with {what}")
