"""On trained models and real text: rows equal autograd one document at a time, whatever they are batched with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attribute import IndexConfig
from attribute.data import Row, TokenFileWriter
from attribute.engine import gradients_of
from attribute.model import load_model, load_tokenizer
from gradcore import TwoSided

# What float32 leaves: transformers' own gradients of a row alone and in a batch differ by up to 1.7e-6 here (ours by
# 1.6e-6), since matrix products of another height are summed in another order. Against float64 both are 2.2e-6 off.
FLOAT32 = 4e-6

MODELS = {
    "llama-stories260k": "text/tinystories-0.9mb.txt",
    "gpt2-shakespeare/run0": "text/tinyshakespeare.txt",
}


@pytest.fixture(scope="module", params=MODELS)
def real(request, assets):
    """A model and eight pieces of its training text, of different length."""
    model = load_model(str(assets / request.param))
    text = (assets / MODELS[request.param]).read_text(encoding="utf-8")[:20_000]
    ids = load_tokenizer(str(assets / request.param))(text, verbose=False)["input_ids"]
    cuts = np.cumsum([5, 64, 17, 2, 48, 33, 64, 21])
    return model, [np.array(ids[stop - size : stop]) for stop, size in zip(cuts, np.diff(cuts, prepend=0))]


def rows_of(model, documents, folder, plan, budget):
    rows = [Row(ids, np.arange(len(ids)) > 0, {}) for ids in documents]
    return gradients_of(model, TokenFileWriter(folder, model.vocabulary).write(rows), plan, budget)


def one_by_one(model, plan, ids):
    """Weight gradients of transformers' own summed loss, [out, in] each, side by side."""
    found = torch.tensor(ids)[None]
    model.model.zero_grad()
    (model.model(found, labels=found).loss * (len(ids) - 1)).backward()
    parts = []
    for planned in plan.modules:
        gradient = model.base.get_submodule(planned.name).weight.grad
        parts.append(gradient.T if planned.kind == "hf_conv1d" else gradient)
    return parts


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_rows_equal_autograd(real, tmp_path):
    model, documents = real
    whole, side = model.plan(IndexConfig(projection_dim=0)), TwoSided(16)
    sketched = model.plan(IndexConfig(projection_dim=16))
    found = rows_of(model, documents, tmp_path / "a", whole, 4096)
    small = rows_of(model, documents, tmp_path / "b", sketched, 4096)
    for row, ids in enumerate(documents):
        truth = one_by_one(model, whole, ids)
        assert relative(found[row], torch.cat([part.flatten() for part in truth]).numpy()) < 1e-5
        projected = [
            side.matrix(planned.name, "left", part.shape[0])
            @ part
            @ side.matrix(planned.name, "right", part.shape[1]).T
            for planned, part in zip(whole.modules, truth)
        ]
        assert relative(small[row], torch.cat([part.flatten() for part in projected]).numpy()) < 1e-5


@pytest.mark.parametrize("budget", [1, 128, 100_000])
def test_rows_do_not_depend_on_batch_order_or_padding(real, budget, tmp_path):
    model, documents = real
    plan = model.plan(IndexConfig(projection_dim=16))
    alone = np.concatenate([rows_of(model, [ids], tmp_path / "one", plan, 1) for ids in documents])
    found = rows_of(model, documents, tmp_path / "a", plan, budget)
    turned = rows_of(model, documents[::-1], tmp_path / "b", plan, budget)[::-1]
    for row in range(len(documents)):
        assert relative(found[row], alone[row]) < FLOAT32
        assert relative(turned[row], alone[row]) < FLOAT32
