"""Trainers whose batches are rows of a dataset with labels: Hugging Face's ``Trainer`` and TRL's ``SFTTrainer``.

Their loss is a mean over the tokens of an accumulated batch; what is stored is the gradient of a row's own summed loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribute._errors import ModelError
from attribute.training._batch import Batch
from attribute.training._callback import GradientCollectorCallback
from attribute.training._rows import DatasetRows
from gradcore import IGNORE

ROW = "trace_row"
"""The column that carries the number of a row to the batch."""

_LOSSES = ("transformers.trainer", "trl.trainer.sft_trainer")
"""Whose ``compute_loss`` is known: a mean of cross-entropies, over the batch or the accumulated batches."""


def prepare(trainer: Any, callback: GradientCollectorCallback) -> None:
    """Number the dataset, and have the row numbers of each batch and the divisor of its loss told.

    Raises:
        ModelError: rows that are joined, or a loss that is no cross-entropy over labels.
    """
    for refused, what in _unlike_cross_entropy(trainer):
        if refused:
            raise ModelError(f"gradients of rows are not collected with {what}")
    dataset = trainer.train_dataset
    callback.attach(trainer, DatasetRows(len(dataset), plain_records(dataset)))
    number_rows(trainer)
    trainer.data_collator = _Collator(trainer.data_collator)
    _watch_steps(trainer, callback)


def _unlike_cross_entropy(trainer: Any) -> Iterator[tuple[bool, str]]:
    """What makes of a batch's loss another thing than the summed cross-entropy of its rows, over their tokens."""
    arguments, model = trainer.args, getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    config, loss = getattr(model, "config", None), type(trainer).compute_loss
    yield getattr(arguments, "packing", False), "packing, which joins rows"
    yield getattr(arguments, "padding_free", False), "padding-free batches, which join rows"
    yield bool(arguments.label_smoothing_factor), "label smoothing"
    yield getattr(arguments, "loss_type", None) == "dft", "loss_type='dft', which weighs tokens: set loss_type='nll'"
    yield loss.__module__ not in _LOSSES, f"a loss of the trainer's own ({loss.__qualname__})"
    yield (
        getattr(trainer, "aux_loss_enabled", getattr(config, "output_router_logits", False)),
        "the auxiliary loss of a router, which is of a whole batch: set output_router_logits=False in the model's "
        "config, and router_aux_loss_coef=0 for TRL",
    )
    yield (
        getattr(config, "is_encoder_decoder", False) or type(model).__name__.endswith("ForMaskedLM"),
        f"a {type(model).__name__}, whose labels are not the next tokens",
    )


def number_rows(trainer: Any) -> None:
    """Give the rows of a trainer's dataset a column :data:`ROW`, which is not removed as unknown to the model."""
    dataset = trainer.train_dataset
    trainer.train_dataset = (
        dataset.add_column(ROW, list(range(len(dataset)))) if hasattr(dataset, "add_column") else _Numbered(dataset)
    )
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, ROW]


def plain_records(dataset: Any) -> Any:
    """The rows of a ``datasets.Dataset``, as plain values; other datasets may hold anything and are not kept."""
    return dataset.with_format(None) if hasattr(dataset, "with_format") else None


def _watch_steps(trainer: Any, callback: GradientCollectorCallback) -> None:
    step: Callable[..., Tensor] = trainer.training_step
    compute_loss: Callable[..., Any] = trainer.compute_loss
    at_work: dict[str, Any] = {}

    def training_step(model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if ROW not in inputs:
            raise ModelError(
                "a batch does not say which rows it has: the trainer's data loader passes its data_collator by, or the "
                "dataset has a transform (set_transform), which leaves the column of their numbers away: map instead"
            )
        rows = inputs.pop(ROW).cpu().numpy().astype(np.int64)
        if "labels" not in inputs:
            raise ModelError("the batches have no labels: the data collator must make them (language modelling)")
        if inputs["labels"].dim() != 2:
            raise ModelError(
                f"labels of shape {list(inputs['labels'].shape)}: gradients are collected of language models, whose "
                "rows have a label for each token"
            )
        at_work["labels"] = inputs["labels"]
        try:
            with callback.backward_pass():
                loss = step(model, inputs, num_items_in_batch)
            counts, scale = _labelled_tokens(at_work["labels"]), at_work["scale"]
        finally:
            at_work.clear()  # after a failure, too: a loss that is only evaluated has no hook
        if callback.reduction == "mean":
            scale = scale / counts[:, None].clamp(min=1)
        state = trainer.state
        callback.receive(Batch(rows, scale, state.global_step, state.epoch or 0.0, trainer._get_learning_rate()))
        return loss

    def loss_of(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **options: Any
    ) -> Any:
        inputs.pop(ROW, None)
        found = compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **options
        )
        if "labels" in at_work:
            items = num_items_in_batch if trainer.model_accepts_loss_kwargs else None
            divisor = float(_labelled_tokens(at_work["labels"]).sum()) if items is None else float(items)

            def receive(gradient: Tensor) -> None:
                # Accumulation and loss scaling multiply the loss after it was computed.
                at_work["scale"] = divisor / float(gradient)

            (found[0] if return_outputs else found).register_hook(receive)
        return found

    trainer.training_step, trainer.compute_loss = training_step, loss_of


def _labelled_tokens(labels: Tensor) -> Tensor:
    """Tokens of each row that count in its loss, ``[n]``."""
    return (labels[:, 1:] != IGNORE).sum(1)


class _Collator:
    """The trainer's collator, with the row numbers carried past it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
