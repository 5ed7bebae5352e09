"""A ``GRPOTrainer`` of a tiny model, and what its optimiser was given, for tests of the rows that it leaves."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from attribute import GradientCollectorCallback, prepare_for_gradient_collection
from gradstore import GradientStore

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PROMPTS = ["the sea", "a hill in the rain", "old towns", "nine bakers keep lamps", "and", "where the hill is"]


def mean_token(completion_ids, **columns):
    """Hardly ever the same twice; it is handed the columns of the dataset and none of ours."""
    assert "trace_row" not in columns
    assert len(columns["name"]) == len(completion_ids)
    return [sum(ids) / len(ids) / 300 for ids in completion_ids]


class Gradients:
    """What the optimiser is given in each step, before it is clipped: module → [out, in]."""

    def __init__(self, trainer):
        self.steps = []
        clip = trainer._clip_grad_norm

        def before_clipping(model):
            self.steps.append(
                {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
            )
            return clip(model)

        trainer._clip_grad_norm = before_clipping

    def of(self, step, module, model):
        kind = type(model.get_submodule(module)).__name__
        ends = (f"{module}.weight",)
        (found,) = [each for name, each in self.steps[step].items() if name.endswith(ends)]
        return (found.T if kind == "Conv1D" else found).float().numpy()


def trainer_of(
    model,
    tokenizer,
    path,
    callback=None,
    *,
    reward=mean_token,
    peft_config=None,
    evaluated=None,
    prompts=PROMPTS,
    **options,
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    defaults = {
        "output_dir": str(path / "out"),
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    data = datasets.Dataset.from_dict({"prompt": prompts, "name": [f"row {n}" for n in range(len(prompts))]})
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**{**defaults, **options}),
        train_dataset=data,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[callback] if callback else [],
    )
    return prepare_for_gradient_collection(trainer) if callback else trainer


def whole(path, **options):
    return GradientCollectorCallback(path / "run", projection_dim=0, track_order=True, **options)


def epoch_of(path, number=0):
    return GradientStore.open(path / "run" / "train" / f"epoch_{number}")


def close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def require_sums(store, gradients, root, tolerance=1e-4, first=0):
    """Rows of every step add up to its gradient, in every module."""
    steps = store.side("step")
    assert sorted(set(steps.tolist())) == list(range(first, first + len(gradients.steps)))
    assert any(np.linalg.norm(gradients.of(step, name, root)) > 0 for name in store.columns for step in (0, 1))
    for step in range(len(gradients.steps)):
        for name in store.columns:
            rows = store.block(0, store.rows, [name])[steps == first + step]
            expected = gradients.of(step, name, root)
            close(rows.sum(0).reshape(expected.shape), expected, tolerance)
