"""GPT-2's gelu in one operation: the model's own to rounding, and only in models that we loaded."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.activations import FastGELUActivation, NewGELUActivation

from attribute._one_operation import in_one_operation
from attribute.model import LanguageModel, load_model


def gelus(model):
    return [type(module) for module in model.modules() if "GELU" in type(module).__name__]


@pytest.fixture
def folder(tmp_path):
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=60, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_loaded_gpt2_computes_as_transformers_does(folder):
    own, ours, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), load_model(folder), torch.arange(48) % 60
    assert gelus(own) == [NewGELUActivation] * 2
    assert gelus(ours.model) == [nn.GELU] * 2
    states = [model(input_ids=ids.view(2, 24)).logits for model in (own, ours.model)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        for logits, model in zip(states, (own, ours.model))
    ]
    for theirs, found in zip(*gradients):
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_of_the_user_stays_as_it_is(folder):
    own = AutoModelForCausalLM.from_pretrained(folder).eval()
    LanguageModel.wrap(own)
    assert gelus(own) == [NewGELUActivation] * 2


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_both_spellings_are_one_function(kind):
    x = torch.linspace(-9, 9, 2001, dtype=torch.double)
    model = nn.Sequential(kind(), nn.SiLU())
    expected = model(x)
    in_one_operation(model)
    assert gelus(model) == [nn.GELU]
    torch.testing.assert_close(model(x), expected, rtol=1e-7, atol=1e-9)
