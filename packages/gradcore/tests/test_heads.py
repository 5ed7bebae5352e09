"""A head's gradient is its part of the module's, whatever the side, the bias and the sketch."""

from __future__ import annotations

import pytest
import torch
from gradcore_models import Conv1D
from torch import nn

from gradcore import AttentionConfig, CaptureError, CapturePlan, GradientCollector, TwoSided, attention_heads, coverage


@pytest.fixture(params=[nn.Linear, lambda i, o: Conv1D(o, i)], ids=["linear", "hf_conv1d"])
def layers(request):
    return nn.Sequential(request.param(6, 8), nn.Tanh(), request.param(8, 4))


def collect(model, x, **options):
    plan = CapturePlan.for_model(model, **options)
    with GradientCollector(model, plan) as collector:
        model(x).sin().sum().backward()
    return plan, collector.gradients


@pytest.mark.parametrize("bias", [False, True])
def test_output_heads_are_rows(layers, bias):
    x = torch.randn(3, 5, 6)
    _, whole = collect(layers, x, include_bias=bias)
    plan, found = collect(layers, x, include_bias=bias, attention={"0": AttentionConfig(4, 2)})
    assert list(found) == ["0.head_0", "0.head_1", "0.head_2", "0.head_3", "2"]
    torch.testing.assert_close(torch.cat([found[f"0.head_{h}"] for h in range(4)], dim=1), whole["0"])
    torch.testing.assert_close(found["2"], whole["2"])
    assert CapturePlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("bias", [False, True])
def test_input_heads_are_columns_and_leave_the_bias_out(layers, bias):
    x = torch.randn(3, 5, 6)
    _, whole = collect(layers, x)
    _, found = collect(layers, x, include_bias=bias, attention={"2": AttentionConfig(2, 4, side="in")})
    torch.testing.assert_close(torch.cat([found["2.head_0"], found["2.head_1"]], dim=2), whole["2"])


def test_each_head_has_its_own_sketch(layers):
    x, sketch = torch.randn(3, 5, 6), TwoSided(3)
    heads = {"0": AttentionConfig(2, 4)}
    _, whole = collect(layers, x, attention=heads)
    plan, found = collect(layers, x, attention=heads, sketch=sketch)
    assert plan.columns == {"0.head_0": 9, "0.head_1": 9, "2": 9}
    for name in ("0.head_0", "0.head_1"):
        left, right = sketch.matrix(name, "left", 4), sketch.matrix(name, "right", 6)
        torch.testing.assert_close(found[name], left @ whole[name] @ right.T, rtol=1e-5, atol=1e-6)


def test_coverage_counts_a_split_matrix_once(layers):
    plan = CapturePlan.for_model(layers, attention={"0": AttentionConfig(4, 2)}, include_bias=True)
    assert coverage(layers, plan).share == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: CapturePlan.for_model(m, attention={"0": AttentionConfig(3, 2)}), r"0 has 8 features.*make 6"),
        (lambda m: CapturePlan.for_model(m, attention={"0": AttentionConfig(2, 4, side="in")}), r"6 features.*make 8"),
        (lambda m: AttentionConfig(0, 4), "positive"),
        (lambda m: AttentionConfig(2, 4, head_dim=1), "last axis"),
        (lambda m: AttentionConfig(2, 4, side="left"), "'out' or 'in'"),
    ],
)
def test_heads_that_do_not_fit_are_refused(layers, make, message):
    with pytest.raises(CaptureError, match=message):
        make(layers)


def test_a_plan_of_heads_refuses_another_model(layers):
    plan = CapturePlan.for_model(layers, attention={"0": AttentionConfig(4, 2)})
    other = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    with pytest.raises(CaptureError, match=r"0 is \[8, 5\]"), GradientCollector(other, plan):
        pass


def test_grouped_query_heads_are_read_off_the_configuration_and_join_to_the_whole():
    """Llama with 4 query heads on 2 key-value heads; GPT-2's and GPT-NeoX's fused matrices."""
    hf = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    models = {
        "llama": hf.LlamaModel(hf.LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2)),
        "gpt2": hf.GPT2Model(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=4, n_positions=32)),
        "neox": hf.GPTNeoXModel(hf.GPTNeoXConfig(**small, num_attention_heads=4, max_position_embeddings=32)),
    }
    counts = {"llama": {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}, "gpt2": {"c_attn": 12, "c_proj": 4}}
    counts["neox"] = {"query_key_value": 4, "dense": 4}
    ids = torch.arange(12).view(2, 6)
    for kind, model in models.items():
        model.eval()
        heads = attention_heads(model)
        assert {path.rpartition(".")[2]: each.num_heads for path, each in heads.items()} == counts[kind], kind
        gradients = []
        for attention in ({}, heads):
            plan = CapturePlan.for_model(model, list(heads), attention=attention)
            with GradientCollector(model, plan) as collector:
                model(input_ids=ids, use_cache=False)[0].square().sum().backward()
            gradients.append(collector.gradients)
        whole, split = gradients
        for path, each in heads.items():
            parts = [split[f"{path}.head_{head}"] for head in range(each.num_heads)]
            torch.testing.assert_close(torch.cat(parts, dim=1 if each.side == "out" else 2), whole[path])


def test_a_model_without_a_configuration_has_no_known_heads():
    assert attention_heads(torch.nn.Sequential(torch.nn.Linear(4, 4))) == {}
