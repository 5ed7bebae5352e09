"""A ``Trainer`` of a tiny model and its dataset, for tests of the rows that it leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attribute import prepare_for_gradient_collection

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")


def rows_of_tokens():
    """Eleven rows: six batches of two, the last one of one."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(2, 300, size=4 + n % 9).tolist() for n in range(11)]
    labels = [[-100, *row[1:]] if n % 3 else row for n, row in enumerate(rows)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": labels, "name": [f"row {n}" for n in range(11)]})


def collate(features):
    width = max(len(each["input_ids"]) for each in features)
    assert all("trace_row" not in each for each in features)

    def padded(name, value):
        return torch.tensor([list(each[name]) + [value] * (width - len(each[name])) for each in features])

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}


def trainer_of(model, data, path, *, callback=None, **options):
    defaults = {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    }
    arguments = transformers.TrainingArguments(**{**defaults, **options})
    callbacks = [callback] if callback else []
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=callbacks
    )
    return prepare_for_gradient_collection(trainer) if callback else trainer


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def files_of(path):
    """Every file but those that are another in every run: the run's id, and locks."""
    found = {each.relative_to(path).as_posix(): each for each in path.rglob("*") if each.is_file()}
    return {name: each.read_bytes() for name, each in found.items() if name != "run.json" and "lock" not in name}
