"""What is masked where nobody says: the maps of the sub-block that the readout reads, on every kind of model."""

import pytest
import torch
from zoo import BLOCKS, ZOO, make

from probing import (
    CircuitConfig,
    CircuitProbe,
    CircuitProbeConfig,
    ReadoutError,
    ResidualUpdateModelConfig,
    SiteError,
)
from probing._default_sites import default_sites
from probing._readout import Readout
from probing._structure import example_inputs, find_blocks

_BERT = (
    ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
    ["intermediate.dense", "output.dense"],
)
_LLAMA = (
    [f"self_attn.{name}_proj" for name in "qkvo"],
    [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
)
_MIXTURE = (_LLAMA[0], ["mlp.experts"])
_OPT = ([f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")], ["fc1", "fc2"])
_NEOX = (["attention.query_key_value", "attention.dense"], ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"])
_T5 = [f"layer.0.SelfAttention.{name}" for name in "qkvo"]
MAPS = {
    **dict.fromkeys(("bert", "roberta", "ernie", "electra"), _BERT),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2"),
        _LLAMA,
    ),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _MIXTURE),
    **dict.fromkeys(("opt", "opt_postnorm"), _OPT),
    **dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), _NEOX),
    "mpnet": ([f"attention.attn.{name}" for name in "qkvo"], _BERT[1]),
    "convbert": (
        [
            *_BERT[0][:3],
            "attention.self.key_conv_attn_layer.depthwise",
            "attention.self.key_conv_attn_layer.pointwise",
            "attention.self.conv_kernel_layer",
            "attention.self.conv_out_layer",
            _BERT[0][3],
        ],
        _BERT[1],
    ),
    "gpt2": (["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neo": ([f"attn.attention.{name}_proj" for name in ("k", "v", "q", "out")], ["mlp.c_fc", "mlp.c_proj"]),
    "vit": ([f"attention.{name}_proj" for name in "qkvo"], ["mlp.fc1", "mlp.fc2"]),
    "bloom": (["self_attention.query_key_value", "self_attention.dense"], _NEOX[1]),
    "t5": (_T5, ["layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"]),
    "phi": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"], ["mlp.fc1", "mlp.fc2"]),
}


def unit_of(kind, part):
    return "expert" if part == "mlp" and MAPS[kind] is _MIXTURE else "neuron"


def sites(kind, key, unit="neuron", model=None):
    model = model or make(kind)
    stack = find_blocks(model, BLOCKS.get(kind))[0]
    readout = Readout.parse(key)
    layer = readout.layer - (readout.kind == "resid_in")
    found = default_sites(model, readout, unit, BLOCKS.get(kind))
    assert all(path.startswith(f"{stack}.{layer}.") for path in found)
    return [path.removeprefix(f"{stack}.{layer}.") for path in found]


def test_every_kind_of_model_is_in_the_table():
    assert MAPS.keys() == ZOO.keys()


@pytest.mark.parametrize("kind", ZOO)
def test_attention_and_mlp_are_given_their_own_maps_and_train(kind):
    model = make(kind)
    for part, expected in zip(("attn", "mlp"), MAPS[kind]):
        unit = unit_of(kind, part)
        key = f"{part}_update_1"
        assert sites(kind, key, unit, model) == expected
        resid = ResidualUpdateModelConfig("auto", [1], blocks=BLOCKS.get(kind), **{part: True})
        paths = default_sites(model, Readout.parse(key), unit, BLOCKS.get(kind))
        circuit = CircuitConfig(mask_hparams={"mask_unit": unit}, target_layers=paths, l0_lambda=0.0)
        probe = CircuitProbe(CircuitProbeConfig(key, circuit, resid), model)
        inputs = example_inputs(model, rows=6, positions=5)
        last = torch.arange(5).expand(6, -1) == 4  # ViT: four patches and the class token
        before = [p.detach().clone() for p in probe.circuit.site_masks.parameters()]
        optimiser = torch.optim.SGD(probe.circuit.site_masks.parameters(), lr=1.0)
        probe.train()(labels=torch.arange(6) % 2, token_mask=last, **inputs).loss.backward()
        optimiser.step()
        moved = [bool((new != old).any()) for old, new in zip(before, probe.circuit.site_masks.parameters())]
        assert all(moved), (kind, [path for path, each in zip(paths, moved) if not each])
        probe.close()
    assert not set(MAPS[kind][0]) & set(MAPS[kind][1])


@pytest.mark.parametrize("kind", [kind for kind in ZOO if kind != "convbert"])
def test_head_outputs_are_given_what_lies_before_the_projection(kind):
    attention = MAPS[kind][0]
    assert sites(kind, "head_output_1") == attention[:-1]
    assert sites(kind, "head_output_1", "head") == attention[-1:]
    assert sites(kind, "head_output_1", "input") == attention
    with pytest.raises(SiteError, match="--unit neuron"):
        sites(kind, "head_output_1", "module")


@pytest.mark.parametrize("kind", ["gpt2", "bert", "gpt_neox", "olmo2"])
def test_the_stream_is_given_what_was_added_to_it(kind):
    attention, mlp = MAPS[kind]
    assert sites(kind, "resid_mid_1") == sites(kind, "attn_stream_1") == attention
    assert sites(kind, "mlp_stream_1") == mlp
    assert sites(kind, "resid_out_1") == sites(kind, "resid_in_1") == attention + mlp
    with pytest.raises(SiteError, match=r"resid_in_0 is the embedding.*resid_out_0.*--sites"):
        sites(kind, "resid_in_0")


def test_cross_attention_is_a_part_of_its_own():
    cross = [f"layer.1.EncDecAttention.{name}" for name in "qkvo"]
    assert sites("t5", "cross_update_1") == cross
    assert sites("t5", "resid_out_1") == [*MAPS["t5"][0], *cross, *MAPS["t5"][1]]


def test_heads_are_the_attentions():
    assert sites("gpt2", "attn_update_1", "head") == ["attn.c_proj"]
    for key in ("mlp_update_1", "mlp_stream_1"):
        with pytest.raises(SiteError, match=rf"heads are the attention's, and {key} reads the MLP; type --unit neuron"):
            sites("gpt2", key, "head")
    with pytest.raises(ReadoutError, match="ConvBERT mixes in a convolution"):
        sites("convbert", "attn_update_1", "head")


def test_experts_are_asked_for_by_name():
    for unit in ("neuron", "input", "weight"):
        with pytest.raises(SiteError, match=r"mlp_update_1 is computed by experts .*mlp\.experts.*--unit expert"):
            sites("mixtral", "mlp_update_1", unit)
    with pytest.raises(SiteError, match=r"--unit expert, or mask the linear maps beside them: --sites .*q_proj"):
        sites("mixtral", "resid_out_1")
    with pytest.raises(SiteError, match="can carry units of kind 'expert'; type --unit neuron"):
        sites("gpt2", "mlp_update_1", "expert")


def test_whole_modules_are_those_that_write_to_the_stream():
    assert sites("gpt2", "attn_update_1", "module") == ["attn"]
    assert sites("opt", "mlp_update_1", "module") == ["fc2"]
    assert sites("gpt2", "resid_in_1", "module") == ["attn", "mlp"]


def test_a_map_that_both_updates_share_is_given_to_neither():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.attn, self.mlp = torch.nn.Linear(8, 12), torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)

        def forward(self, hidden_states):
            first, second = self.both(hidden_states).split([4, 8], -1)
            return hidden_states + self.attn(first.tanh()) + self.mlp(second.tanh())

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"vocab_size": 20})()
            self.embed, self.layers = torch.nn.Embedding(20, 8), torch.nn.ModuleList(Shared() for _ in range(2))

        def forward(self, input_ids):
            found = self.embed(input_ids)
            for layer in self.layers:
                found = layer(found)
            return found

    model = Model()
    assert default_sites(model, Readout("attn_update", 1), "neuron") == ["layers.1.attn"]
    assert default_sites(model, Readout("mlp_update", 1), "neuron") == ["layers.1.mlp"]
