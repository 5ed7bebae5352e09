"""Trainers that sample what they learn from: TRL's ``GRPOTrainer``, whose rows are completions.

It samples for several optimiser steps at once, shuffles and splits what it has sampled, and may learn from each
completion several times; a number beside every completion follows it through all of that. A row is the gradient of its
share of the trainer's own loss (advantage, clipping, KL, normaliser and accumulation as they are), so that the rows of
a step sum to the gradient that the optimiser is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attribute._errors import ModelError
from attribute.training._batch import Batch, Completion
from attribute.training._callback import GradientCollectorCallback
from attribute.training._completions import COMPLETION, IDS, Completions
from attribute.training._labelled import ROW, number_rows, plain_records
from gradcore import not_collecting

PLACE = "trace_completion"
"""The place of a completion among those that were sampled together, carried through TRL's buffer."""


@dataclass(frozen=True)
class _Sampled:
    """One completion as it was sampled and scored."""

    row: int
    generation: int
    content: Any
    ids: list[int]
    reward: float | None


def samples(trainer: Any) -> bool:
    """Whether a trainer is a ``GRPOTrainer``; TRL need not be installed to know."""
    return any(each.__name__ == "GRPOTrainer" for each in type(trainer).__mro__)


def prepare(trainer: Any, callback: GradientCollectorCallback) -> None:
    """Number the prompts, and follow their completions from the sampling to the loss.

    Raises:
        ModelError: images, Liger kernels, a mean over tokens, columns that the store needs, or a TRL without the
            methods that are followed.
    """
    _require_supported(trainer, callback)
    records = plain_records(trainer.train_dataset)
    callback.attach(trainer, Completions(records))
    number_rows(trainer)
    sampled: list[_Sampled] = []
    _watch_sampling(trainer, sampled)
    _watch_steps(trainer, callback, sampled)


def _require_supported(trainer: Any, callback: GradientCollectorCallback) -> None:
    if not hasattr(trainer.train_dataset, "column_names"):
        raise ModelError(
            f"prompts in a {type(trainer.train_dataset).__name__} have no columns to be kept: load it as a "
            "datasets.Dataset"
        )
    arguments, columns = trainer.args, set(trainer.train_dataset.column_names)
    taken = sorted(columns & {COMPLETION, IDS})
    for refused, what in (
        (callback.reduction != "sum", "reduction='mean': a row is its share of the trainer's loss; leave it 'sum'"),
        (columns & {"image", "images"}, "images: remove the columns image and images (dataset.remove_columns)"),
        (getattr(arguments, "use_liger_loss", False), "Liger's loss: set use_liger_loss=False"),
        (arguments.use_liger_kernel, "Liger's kernels: set use_liger_kernel=False"),
        (taken, f"a dataset that has a column {', '.join(taken)} already: dataset.rename_column gives it another name"),
    ):
        if refused:
            raise ModelError(f"gradients of completions are not collected with {what}")
    for name in ("_generate_and_score_completions", "_calculate_rewards"):
        if not hasattr(trainer, name):
            raise ModelError(
                f"this GRPOTrainer has no method {name}, by which completions are followed: install trl>=1.16"
            )


def _watch_sampling(trainer: Any, sampled: list[_Sampled]) -> None:
    """Fill ``sampled`` anew whenever the trainer samples to train, and number the completions."""
    generate: Callable[..., dict[str, Any]] = trainer._generate_and_score_completions
    score: Callable[..., Tensor] = trainer._calculate_rewards
    scored: dict[str, Any] = {}

    def calculate_rewards(inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = score(inputs, prompts, completions, completion_ids_list)
        weighted = (rewards * trainer.reward_weights.to(rewards.device)).nansum(1)
        unscored = rewards.isnan().all(1).tolist()
        scored["completions"], scored["ids"] = list(completions), [list(each) for each in completion_ids_list]
        scored["rewards"] = [None if no else value for value, no in zip(weighted.tolist(), unscored)]
        return rewards

    def generate_and_score(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with not_collecting():
            if not all(ROW in each for each in inputs):  # an evaluation's
                return generate(inputs)
            # Reward functions are handed all columns of the dataset, and this is none of it.
            output = generate([{name: value for name, value in each.items() if name != ROW} for each in inputs])
        parts = scored["completions"], scored["ids"], scored["rewards"]
        sampled[:] = [
            _Sampled(int(given[ROW]), place % trainer.num_generations, *each)
            for place, (given, *each) in enumerate(zip(inputs, *parts, strict=True))
        ]
        return {**output, PLACE: torch.arange(len(inputs), device=output["advantages"].device)}

    trainer._calculate_rewards, trainer._generate_and_score_completions = calculate_rewards, generate_and_score


def _watch_steps(trainer: Any, callback: GradientCollectorCallback, sampled: list[_Sampled]) -> None:
    step: Callable[..., Tensor] = trainer.training_step
    compute_loss: Callable[..., Any] = trainer.compute_loss
    at_work: list[dict[str, Any]] = []

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        at_work.clear()
        with callback.backward_pass():
            loss = step(model, inputs, num_items_in_batch)
        if len(at_work) != 1:
            raise ModelError(
                f"a step took {len(at_work)} losses of numbered completions where one was expected: the trainer "
                "samples past its own methods, or the dataset has a transform (set_transform), which leaves the column "
                "of the rows' numbers away: map instead"
            )
        (batch,) = at_work
        found = [sampled[place] for place in batch[PLACE].tolist()]
        state, scaler = trainer.state, trainer.accelerator.scaler
        callback.receive(
            Batch(
                np.array([each.row for each in found], dtype=np.int64),
                1.0 if scaler is None else 1 / scaler.get_scale(),
                state.global_step,
                state.epoch or 0.0,
                trainer._get_learning_rate(),
                _completions(found, batch),
            )
        )
        return loss

    def loss_of(model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        if PLACE in inputs:
            at_work.append(inputs)
        return compute_loss(model, inputs, *arguments, **options)

    trainer.training_step, trainer.compute_loss = training_step, loss_of


def _completions(found: list[_Sampled], batch: dict[str, Any]) -> list[Completion]:
    advantages, mask = batch["advantages"], batch["completion_mask"]
    if advantages.dim() != 1:
        raise ModelError(
            f"advantages of shape {list(advantages.shape)}: one of each completion is stored, this trainer has one of "
            "each token"
        )
    if "tool_mask" in batch:
        mask = mask * batch["tool_mask"]
    return [
        Completion(each.generation, each.content, each.ids, each.reward, advantage, tokens)
        for each, advantage, tokens in zip(found, advantages.tolist(), mask.sum(1).tolist(), strict=True)
    ]
