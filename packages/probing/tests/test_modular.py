"""Circuit probing finds what a network computes, and nothing where it computes nothing: experiment 1 at modulus 59.

Lepori et al. 2024, §4.1: a network trained on a² − b² (mod P) computes a² and b² in its attention, not a + b or a − b.
"""

import modular
import pytest
import torch

from probing import (
    CircuitConfig,
    CircuitProbe,
    CircuitProbeConfig,
    ProbeData,
    ResidualUpdateModelConfig,
    TrainPlan,
    evaluate,
    fit,
)


@pytest.fixture(scope="module")
def task():
    return modular.disambiguation(59)


@pytest.fixture(scope="module")
def model(task):
    torch.set_num_threads(1)
    # Full-batch AdamW at a constant rate ends in a spike on some CPUs and not on others; a falling rate ends in none.
    return modular.train(task, epochs=400, lr=3e-3, decay=0.3)


def probing(model, task, variable, part="attn"):
    config = CircuitProbeConfig(
        f"{part}_update_0",
        CircuitConfig(
            "continuous_sparsification", {"mask_unit": "neuron"}, [f"transformer.h.0.{part}.c_*"], l0_lambda=1e-6
        ),
        ResidualUpdateModelConfig("gpt", [0], **{part: True}),
    )
    probe = CircuitProbe(config, model)
    rows = [
        ProbeData.at_last({"input_ids": task.ids[part]}, task.variables[variable][part])
        for part in (task.train, task.test)
    ]
    fit(probe, rows[0], TrainPlan(epochs=60))
    return probe, evaluate.evaluate_knn(probe, *rows)


def effect(model, task, circuit, **how):
    return evaluate.ablation(model, circuit, lambda m: modular.correct(m, task, task.test), **how)


def test_the_network_has_learnt_the_task(model, task):
    assert modular.correct(model, task, task.test).mean() > 0.97
    ids = task.ids[task.test[:100]]
    torch.testing.assert_close(modular.last_logits(model, ids), model(ids).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_a_variable_the_network_uses_is_found_and_needed(model, task):
    probe, knn = probing(model, task, "a^2")
    assert knn.circuit.mean >= 0.95
    assert knn.circuit.mean - knn.full.mean >= 0.2
    found = effect(model, task, probe.circuit.masks(), controls=3)
    assert found.ablated.mean <= 0.10
    # The circuit keeps most of c_proj, so no equal-sized random set lies outside it; that is said, not recorded as −1.
    assert found.undefined is not None
    assert "c_proj" in found.undefined


def test_a_variable_the_network_does_not_compute_leaves_an_empty_circuit(model, task):
    probe, knn = probing(model, task, "a+b")
    assert knn.circuit.mean <= 0.05
    masks = probe.circuit.masks()
    assert masks.share <= 0.05
    assert effect(model, task, masks).ablated.mean >= 0.95
