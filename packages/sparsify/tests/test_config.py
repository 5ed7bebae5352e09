"""Numbers that make no sense, and options that would do nothing, are refused before anything runs."""

import pytest

from sparsify import ConfigError, SaeConfig, TrainConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 1.5}, "k=1.5 must be a whole number"),
        ({"k": True}, "must be a whole number"),
        ({"expansion_factor": 0}, "expansion_factor=0 must be at least 1"),
        ({"num_latents": -1}, "num_latents=-1 must be at least 0"),
        ({"matryoshka": (0, 8)}, "matryoshka=0 must be at least 1"),
    ],
)
def test_shapes(values, message):
    with pytest.raises(ConfigError, match=message):
        SaeConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 must be above zero"),
        ({"lr": -1e-3}, "lr=-0.001 must be above zero"),
        ({"lr": float("nan")}, "lr=nan must be a finite number"),
        ({"lr": "fast"}, "lr='fast' must be a finite number"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"micro_acc_steps": 1.0}, "micro_acc_steps=1.0 must be a whole number"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps=-1 must be at least 0"),
        ({"k_decay_steps": -5}, "k_decay_steps=-5 must be at least 0"),
        ({"save_every": -1}, "save_every=-1 must be at least 0"),
        ({"auxk_alpha": -0.1}, "auxk_alpha=-0.1 must be zero or more"),
        ({"auxk_alpha": float("inf")}, "auxk_alpha=inf must be a finite number"),
        ({"dead_feature_threshold": -1}, "dead_feature_threshold=-1 must be at least 0"),
        ({"max_norm_ratio": 0.5}, "leaves out ordinary tokens"),
        ({"exclude_tokens": [-1]}, "exclude_tokens=-1 must be at least 0"),
        ({"layers": [-1]}, "layers=-1 must be at least 0"),
        ({"init_seeds": [0.5]}, "init_seeds=0.5 must be a whole number"),
    ],
)
def test_runs(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "signum", "lr_warmup_steps": 10}, "lr_warmup_steps=10 would do nothing, since signum"),
        ({"sparsity_coefficient": 0.3}, "sparsity_coefficient=0.3 would do nothing, since topk has no sparsity loss"),
        ({"k_decay_steps": 9, "sae": SaeConfig(activation="groupmax")}, "which groupmax cannot follow"),
    ],
)
def test_options_without_an_effect(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)
    TrainConfig(optimizer="signum")
    TrainConfig(SaeConfig(activation="jumprelu"), sparsity_coefficient=0.3)
