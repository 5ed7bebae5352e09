"""Subject number in real models. Runs where TRACE_ASSETS (or ../shared/assets) has them."""

import agreement
import pytest
import torch
import transformers as tf

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

pytestmark = pytest.mark.skipif(not agreement.assets().is_dir(), reason="the folder of real models is not here")

WORDS = ((" is", " are"), (" was", " were"))
CASES = {
    "gpt2-shakespeare": ("gpt2-shakespeare/run0", "mlp_update_0", "transformer.h.0.mlp.c_*", False),
    "llama-stories260k": ("llama-stories260k", "mlp_update_4", "model.layers.4.mlp.*_proj", True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_circuit_for_subject_number(name):
    folder, readout, sites, bos = CASES[name]
    model = tf.AutoModelForCausalLM.from_pretrained(agreement.assets() / folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(agreement.assets() / folder)
    (train_inputs, train_labels), (inputs, labels) = (
        agreement.encode(tokenizer, agreement.prefixes(train, 400 if train else 120), bos) for train in (True, False)
    )
    train, test = ProbeData.at_last(train_inputs, train_labels), ProbeData.at_last(inputs, labels)
    circuit = CircuitConfig(mask_hparams={"mask_unit": "neuron"}, target_layers=[sites], l0_lambda=1e-6)
    resid = ResidualUpdateModelConfig("auto", [int(readout[-1])], mlp=True)
    probe = CircuitProbe(CircuitProbeConfig(readout, circuit, resid), model)
    fit(probe, train, TrainPlan(epochs=80, batch_size=400))
    knn, masks = evaluate.evaluate_knn(probe, train, test), probe.circuit.masks()
    # The nouns tested are never the probed noun of a training row: the circuit computes number, not words.
    assert knn.circuit.mean > knn.full.mean + 0.03
    assert knn.circuit.mean > 0.85
    verbs = [tuple(agreement.continuation(tokenizer, form) for form in pair) for pair in WORDS]
    with torch.no_grad():
        effect = evaluate.ablation(
            model, masks, lambda m: agreement.agreement(m, inputs, labels, verbs).mean(1), controls=9, pool="all"
        )
    if name == "gpt2-shakespeare":
        assert effect.full.mean > 0.9
        assert effect.necessity > 0.15
        assert effect.p_value == pytest.approx(0.1)
