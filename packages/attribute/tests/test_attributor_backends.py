"""The seed's own lines, and the two other ways to search: FAISS and a device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attribute import Attributor, FaissConfig, IndexConfig, ModelError, RunError, collect_gradients
from attribute._device_search import search_on
from attribute.model import LanguageModel
from gradstore import GradientStore, search


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("gpt2").eval()


@pytest.fixture(scope="module")
def index(model, documents, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("backends") / "run"
    records = [{"text": text} for text in documents]
    config = IndexConfig(projection_dim=6, rows_per_shard=9)
    collect_gradients(LanguageModel.wrap(model), records, path, tokenizer=tokenizer, config=config)
    return path


def seed_example(attr, model, tokenizer, query):
    """What the README of the field shows, to the letter."""
    query_tokens = tokenizer(query, return_tensors="pt").to("cpu")["input_ids"]

    # Query the index
    with attr.trace(model.base_model, 5) as result:
        model(query_tokens, labels=query_tokens).loss.backward()
        model.zero_grad()
    return result


def test_the_seed_runs_as_it_stands(index, model, tokenizer, documents):
    args = SimpleNamespace(index=str(index))
    attr = Attributor(args.index, device="cpu")
    result = seed_example(attr, model, tokenizer, documents[7])
    assert result.indices.shape == result.scores.shape == (1, 5)
    assert 7 in result.indices[0]


@pytest.mark.parametrize("unit_norm", [False, True])
def test_the_seed_runs_with_faiss(unit_norm, index, model, tokenizer, documents):
    pytest.importorskip("faiss", reason="needs the extra: gradstore[faiss]")
    args = SimpleNamespace(index=index)
    exact = seed_example(Attributor(args.index, unit_norm=unit_norm), model, tokenizer, documents[7])
    attr = Attributor(
        args.index, device="cpu", unit_norm=unit_norm, faiss_cfg=FaissConfig("IVF1,SQfp16", mmap_index=True)
    )
    result = seed_example(attr, model, tokenizer, documents[7])
    assert result.indices[0, 0] == exact.indices[0, 0]
    np.testing.assert_allclose(result.scores, exact.scores, rtol=5e-3)  # fp16 rows
    assert [hit.text for hit in result.proponents()][:1] == [documents[int(exact.indices[0, 0])]]
    assert index.with_name("run.faiss").is_dir()


def test_faiss_counts_only_the_modules_asked_for(index):
    pytest.importorskip("faiss", reason="needs the extra: gradstore[faiss]")
    plain, faiss = Attributor(index), Attributor(index, faiss_cfg=FaissConfig("Flat"))
    rows = plain.store.block(3, 8)
    for modules in (None, "h.0.*"):
        for reverse in (False, True):
            expected = plain.search(rows, 4, modules=modules, reverse=reverse)
            found = faiss.search(rows, 4, modules=modules, reverse=reverse)
            assert np.array_equal(found.indices, expected.indices)
            np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_several_backward_passes_are_several_queries_in_both_directions(index, model, tokenizer, documents):
    attr = Attributor(index, unit_norm=True)
    ids = [tokenizer(documents[row], return_tensors="pt")["input_ids"] for row in (3, 30, 12)]
    with attr.trace(model.base_model, 4, modules="h.1.*", reverse=True) as together:
        for each in ids:
            model(each, labels=each).loss.backward()
    for number, each in enumerate(ids):
        with attr.trace(model.base_model, 4, modules="h.1.*", reverse=True) as alone:
            model(each, labels=each).loss.backward()
        assert np.array_equal(together.indices[number], alone.indices[0])
        np.testing.assert_allclose(together.scores[number], alone.scores[0], rtol=1e-5, atol=1e-6)
    assert (together.scores[:, 0] <= together.scores[:, -1]).all()  # the most opposed first
    assert [hit.row for hit in together.opponents(1)] == together.indices[1].tolist()


@pytest.mark.parametrize("metric", ["dot", "cos"])
@pytest.mark.parametrize("modules", [None, ["h.0.attn.c_attn", "h.1.mlp.c_fc"]])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_a_device_finds_what_the_exact_search_finds(metric, modules, k, index):
    store = GradientStore.open(index)
    queries = np.random.default_rng(0).standard_normal((3, store.width)).astype(np.float32)
    expected = search(store, queries, k, metric=metric, modules=modules)
    found = search_on(torch.device("cpu"), store, queries, k, metric=metric, modules=modules)
    for name in ("top_rows", "bottom_rows"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    for name in ("top_scores", "bottom_scores"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_bad_devices_and_queries_are_refused(index):
    with pytest.raises(ModelError, match="no device 'abacus'"):
        Attributor(index, device="abacus")
    store = GradientStore.open(index)
    for wrong in (np.zeros((1, store.width - 1), np.float32), np.full((1, store.width), np.nan, np.float32)):
        with pytest.raises(RunError, match="queries must be finite"):
            search_on(torch.device("cpu"), store, wrong, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same(index):
    rows = GradientStore.open(index).block(0, 5)
    expected, found = Attributor(index).search(rows, 3), Attributor(index, device="cuda").search(rows, 3)
    assert np.array_equal(found.indices, expected.indices)
