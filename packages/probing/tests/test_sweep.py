"""Probes trained together end exactly as probes trained alone."""

import pytest
import torch
from test_probes import circuit_probe, task
from transformers import LlamaConfig, LlamaForCausalLM

from probing import (
    CircuitConfig,
    CircuitProbe,
    CircuitProbeConfig,
    ConfigError,
    DataError,
    ProbeData,
    ResidualUpdateModelConfig,
    TrainPlan,
    fit,
    fit_many,
)

PLAN = TrainPlan(epochs=6, batch_size=5, lr=0.05)


def relabelled(data, seed):
    labels = torch.randint(0, 3, (len(data),), generator=torch.Generator().manual_seed(seed))
    return ProbeData(data.inputs, labels, data.token_mask)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "t5"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("rule", ["continuous_sparsification", "hard_concrete"])
def test_together_is_the_same_as_alone(kind, part, rule):
    model, data = task(kind)
    parts = [relabelled(data, seed) for seed in range(3)]
    each = [{"l0_lambda": 10.0**-n, "seed": n} for n in (2, 3, 4)]
    alone, together = ([circuit_probe(model, kind, part, rule=rule, **one) for one in each] for _ in range(2))
    traces = [fit(probe, own, PLAN) for probe, own in zip(alone, parts)]
    found = fit_many(together, parts, PLAN)
    for a, b, x, y in zip(alone, together, traces, found):
        for one, other in zip(a.circuit.site_masks, b.circuit.site_masks):
            torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)
        assert x.loss == pytest.approx(y.loss, abs=1e-4)
    assert not torch.equal(together[0].circuit.site_masks[0].logits, together[1].circuit.site_masks[0].logits)


@pytest.mark.parametrize(("unit", "sites"), [("input", "*.layers.1.mlp.*_proj"), ("neuron", "*.layers.*.mlp.*_proj")])
def test_other_units_and_several_blocks_too(unit, sites):
    model, data = task("llama")
    alone, together = (
        [
            circuit_probe(model, "llama", "mlp", sites=sites, hparams={"mask_unit": unit}, l0_lambda=v)
            for v in (0.0, 1e-3)
        ]
        for _ in range(2)
    )
    for probe in alone:
        fit(probe, data, PLAN)
    fit_many(together, [data, data], PLAN)
    for a, b in zip(alone, together):
        for one, other in zip(a.circuit.site_masks, b.circuit.site_masks):
            torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)


def by_layer(model, layer, part, sites, key=None, **circuit):
    config = CircuitConfig(mask_hparams={"mask_unit": "neuron"}, target_layers=[sites], **circuit)
    kinds = {"heads": True} if key else {part: True}
    resid = ResidualUpdateModelConfig("auto", [layer], **{"attn": False, "mlp": False, **kinds})
    return CircuitProbe(CircuitProbeConfig(key or f"{part}_update_{layer}", config, resid), model)


def test_layers_and_sub_blocks_are_trained_in_one_pass():
    model, data = task("gpt2")

    def probes():
        return [
            by_layer(model, layer, part, f"transformer.h.{layer}.{part}.c_*", l0_lambda=weight)
            for weight in (0.0, 1e-3)
            for layer in (0, 1)
            for part in ("attn", "mlp")
        ]

    alone, together = probes(), probes()
    parts = [relabelled(data, seed % 3) for seed in range(len(alone))]
    traces = [fit(probe, own, PLAN) for probe, own in zip(alone, parts)]
    steps = []
    found = fit_many(together, parts, PLAN, progress=lambda step, of, loss: steps.append((step, of)))
    for a, b, x, y in zip(alone, together, traces, found):
        for one, other in zip(a.circuit.site_masks, b.circuit.site_masks):
            torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)
        assert x.loss == pytest.approx(y.loss, abs=1e-4)
        assert x.temperature == y.temperature
    count = len(traces[0].loss)
    assert steps == [(step + 1, count) for step in range(count)]


def test_readouts_of_other_widths_are_refused():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    model = LlamaForCausalLM(config).eval()
    data = ProbeData.at_last({"input_ids": torch.randint(50, (12, 5))}, torch.arange(12) % 3)
    one = by_layer(model, 1, "attn", "model.layers.1.self_attn.*_proj")
    other = by_layer(model, 1, "attn", "model.layers.1.self_attn.[qkv]_proj", "head_output_1")
    with pytest.raises(ConfigError, match="readouts of one width"):
        fit_many([one, other], [data, data], PLAN)


def test_what_does_not_fit_together_is_refused():
    model, data = task("gpt2")
    one = circuit_probe(model)
    with pytest.raises(ConfigError, match="share one model"):
        fit_many([one, circuit_probe(task("gpt2")[0])], [data, data], PLAN)
    with pytest.raises(ConfigError, match="one for each"):
        fit_many([one], [data, data], PLAN)
    with pytest.raises(ConfigError, match="units of kind"):
        fit_many([circuit_probe(model, hparams={"mask_unit": "weight"})], [data], PLAN)
    with pytest.raises(ConfigError, match="use fit"):
        fit_many([one], [data], TrainPlan(target_sparsity=0.5))
    with pytest.raises(DataError, match="only labels may differ"):
        fit_many([one, circuit_probe(model)], [data, task("gpt2", rows=11)[1]], PLAN)
    with pytest.raises(DataError, match="one position a row"):
        fit_many([one], [task("gpt2", tokens=True)[1]], PLAN)


def test_regression_what_cannot_train_together_says_so():
    model, data = task("gpt2")
    with pytest.raises(ConfigError, match="nothing to train"):
        fit_many([circuit_probe(model, rule="random") for _ in range(2)], [data] * 2, PLAN)
    off = circuit_probe(model)
    off.circuit.use_masks(False, "*c_attn")
    with pytest.raises(ConfigError, match="all their masks on"):
        fit_many([circuit_probe(model), off], [data] * 2, PLAN)


def test_masked_and_unmasked_biases_train_beside_each_other():
    model, data = task("gpt2")
    hparams = [{"mask_unit": "neuron", "mask_bias": mask_bias} for mask_bias in (False, True)]
    alone, together = ([circuit_probe(model, hparams=each) for each in hparams] for _ in range(2))
    for probe in alone:
        fit(probe, data, PLAN)
    fit_many(together, [data] * 2, PLAN)
    for a, b in zip(alone, together):
        for one, other in zip(a.circuit.parameters(), b.circuit.parameters()):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
