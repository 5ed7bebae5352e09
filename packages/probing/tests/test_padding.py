"""Padding changes nothing: not a readout, not a probe's loss, not what the cache replays – on either side."""

import pytest
import torch
import zoo
from test_probes import SITES, circuit_probe

from probing import (
    CircuitConfig,
    DataError,
    ProbeData,
    ResidualUpdateModel,
    ResidualUpdateModelConfig,
    SubnetworkProbe,
    SubnetworkProbeConfig,
    TrainPlan,
    fit,
)
from probing._prefix import FullModel, Prefix
from probing._structure import example_inputs

TEXT = ["bert", "gpt2", "gpt_neox", "llama", "gemma3", "opt", "bloom", "qwen3_moe", "mpnet", "mistral"]


def ragged(model, rows=12, width=7, side="right", padded=lambda row: row % 3 == 1):
    """Rows of which some are shorter and padded on one side, beside the same texts without padding."""
    ids = example_inputs(model, rows=rows, positions=width)["input_ids"]
    attention = torch.ones_like(ids)
    for row in range(rows):
        if padded(row):
            attention[row, slice(-2, None) if side == "right" else slice(0, 2)] = 0
    labels = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(4))
    return ProbeData.at_last({"input_ids": ids, "attention_mask": attention}, labels)


@pytest.mark.parametrize("kind", TEXT)
def test_a_padded_row_reads_out_as_the_row_alone(kind):
    model = zoo.make(kind)
    data = ragged(model)
    resid = ResidualUpdateModelConfig("auto", [1], attn=True, mlp=True, stream=True)
    hooked = ResidualUpdateModel(resid, model)
    with torch.no_grad():
        hooked(**data.inputs)
        together = dict(hooked.vector_cache)
        for row in (0, 1, 4):
            length = int(data.inputs["attention_mask"][row].sum())
            hooked(input_ids=data.inputs["input_ids"][row : row + 1, :length])
            for key, alone in hooked.vector_cache.items():
                torch.testing.assert_close(together[key][row, :length], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("kind", TEXT)
def test_regression_padding_in_some_batches_only_reaches_the_cache(kind, part, side):
    """Models drop the mask of a batch that has no padding; what the first batch lacked was lost for all others."""
    if SITES[kind][0 if part == "attn" else 1] is None:
        pytest.skip("no linear sites in this sub-block")
    model = zoo.make(kind)
    data = ragged(model, side=side, padded=lambda row: row in (9, 10))
    probe = circuit_probe(model, kind, part)
    with torch.no_grad():
        for mask in probe.circuit.site_masks:
            mask.logits.normal_()
    fast, slow = Prefix(probe, data, batch_size=4), FullModel(probe, data)
    for rows in ([9, 0, 10, 3], [0, 1, 2]):
        rows = torch.tensor(rows)
        found, expected = (source.vectors(rows) for source in (fast, slow))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("readout", ["update", "stream"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_training_on_padded_rows_gives_the_same_masks_cached_or_not(part, readout):
    logits = []
    for cache in (True, False):
        model = zoo.make("llama")
        probe = circuit_probe(model, "llama", part, readout, l0_lambda=1e-4)
        fit(probe, ragged(model), TrainPlan(epochs=5, batch_size=5, lr=0.05), cache=cache)
        logits.append(torch.cat([mask.logits.detach().flatten() for mask in probe.circuit.site_masks]))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_a_probes_loss_does_not_depend_on_how_far_rows_are_padded():
    model = zoo.make("gpt2")
    data = ragged(model)
    wider = {name: torch.nn.functional.pad(t, (0, 3)) for name, t in data.inputs.items()}
    resid = ResidualUpdateModelConfig("gpt", [1], attn=True)
    config = CircuitConfig(mask_hparams={"mask_unit": "neuron"}, target_layers=["transformer.h.1.attn.c_*"])
    for probe in (
        circuit_probe(model),
        SubnetworkProbe(SubnetworkProbeConfig("attn_update_1", 3, config, resid), model),
    ):
        near = probe(labels=data.labels, token_mask=data.token_mask, **data.inputs).loss
        far = probe(labels=data.labels, token_mask=torch.nn.functional.pad(data.token_mask, (0, 3)), **wider).loss
        torch.testing.assert_close(near, far)


def test_probing_padding_is_refused():
    model = zoo.make("gpt2")
    data = ragged(model)
    last = torch.zeros_like(data.token_mask)
    last[:, -1] = True
    with pytest.raises(DataError, match=r"position 6 of row 1.*padding.*at_last"):
        ProbeData(data.inputs, data.labels, last)
    with pytest.raises(DataError, match="padding"):
        circuit_probe(model)(labels=data.labels, token_mask=last, **data.inputs)
