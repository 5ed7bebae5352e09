"""Hookpoints on any module, and a forward pass no longer than it need be."""

import pytest
import torch
from small import Tiny, token_rows
from transformers import GPT2Config, GPT2LMHeadModel

from sparsify import HookpointError
from sparsify._hooks import find_hookpoints, frozen, run, spliced

ROWS = token_rows(2, 5)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=12, n_head=2, vocab_size=30, n_positions=16)).eval()


def test_the_patterns_of_the_readme():
    model = gpt2()
    attention, inner = find_hookpoints(model, ["h.*.attn"]), find_hookpoints(model, ["h.*.mlp.act"])
    assert attention == [f"h.{i}.attn" for i in range(12)]
    assert inner == [f"h.{i}.mlp.act" for i in range(12)]
    some = find_hookpoints(model, ["h.[012].attn", "h.[012].mlp.act"])
    assert some == ["h.0.attn", "h.0.mlp.act", "h.1.attn", "h.1.mlp.act", "h.2.attn", "h.2.mlp.act"]
    assert find_hookpoints(model) == [f"h.{i}" for i in range(12)]
    assert find_hookpoints(model, layers=[10, 2]) == ["h.10", "h.2"]
    assert find_hookpoints(model, stride=5) == ["h.0", "h.5", "h.10"]
    sites = run(model, ROWS, some, inputs=True)
    assert sites["h.1.mlp.act"].output.shape == (2, 5, 64)
    assert sites["h.0.attn"].input.shape == (2, 5, 16)


def test_keyword_calls_tuples_and_unequal_widths():
    sites = run(Tiny(), ROWS, ["layers.0.attn", "layers.1.up"], inputs=True)
    assert sites["layers.0.attn"].input.shape == sites["layers.0.attn"].output.shape == (2, 5, 12)
    assert (sites["layers.1.up"].input.shape[-1], sites["layers.1.up"].output.shape[-1]) == (12, 24)


def test_the_forward_pass_stops_after_the_deepest_hookpoint():
    model = Tiny()
    whole = run(model, ROWS, ["layers.0", "layers.1", "layers.2"])
    model.base_model.calls.clear()
    part = run(model, ROWS, ["layers.1", "layers.0"])
    assert model.base_model.calls == [0, 1]
    assert list(part) == ["layers.1", "layers.0"]
    for name, site in part.items():
        assert torch.equal(site.output, whole[name].output)


def test_hooks_are_gone_after_an_error():
    model = Tiny()
    with pytest.raises(IndexError):
        run(model, torch.full((1, 3), 99), ["layers.2"])
    with pytest.raises(ZeroDivisionError), spliced(model, {"layers.0": lambda x, y: 1 / 0}):
        model(ROWS)
    assert not any(m._forward_hooks for m in model.modules())


def test_splicing_replaces_the_tensor_and_keeps_the_rest():
    model = Tiny()
    clean = model(ROWS)
    with spliced(model, {"layers.0.attn": lambda x, y: y, "layers.1": lambda x, y: y}):
        assert torch.equal(model(ROWS), clean)
    with spliced(model, {"layers.0.attn": lambda x, y: 0 * y, "layers.1": lambda x, y: y}):
        assert not torch.equal(model(ROWS), clean)
    gpt = gpt2()
    with torch.no_grad():
        before = gpt(ROWS).logits
        with spliced(gpt, {"h.3.attn": lambda x, y: y, "h.3": lambda x, y: y}):
            assert torch.equal(gpt(ROWS).logits, before)


def test_freezing_is_undone():
    model = Tiny().train()
    model.base_model.layers[0].eval()
    with frozen(model, no_parameter_gradients=True):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert not model.base_model.layers[0].training
    assert all(p.requires_grad for p in model.parameters())


def test_ambiguous_layers_ask_for_names():
    model = Tiny()
    model.base_model.more = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))
    with pytest.raises(HookpointError, match=r"found layers \(3\), more \(3\)\): name the hookpoints"):
        find_hookpoints(model)
    with pytest.raises(HookpointError, match="returns Tensor, not a tensor of activations"):
        run(torch.nn.Sequential(torch.nn.Embedding(9, 3), torch.nn.Flatten(0)), torch.tensor([[1, 2]]), ["1"])
