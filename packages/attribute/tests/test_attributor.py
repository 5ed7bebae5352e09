"""Asking a store: gradients in, rows out, with the right sign and from the right model only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribute import (
    Asker,
    AttributionError,
    Attributor,
    DataConfig,
    DataError,
    IndexConfig,
    ModelError,
    QueryConfig,
    RunError,
    build_index,
    collect_gradients,
)
from attribute.engine import gradients_of
from attribute.model import LanguageModel, load_model
from attribute.query import answer, columns_for, read_queries
from gradcore import CaptureError, GradientCollector, SelectionError
from gradstore import GradientStore, InvalidInput

PLANTED = 11  # row 40 repeats it


@pytest.fixture(scope="module")
def texts(documents: list[str]) -> list[str]:
    return [*documents, documents[PLANTED]]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox"])
def model_folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def index(model_folder: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(dataset=str(folder / "data.jsonl"))
    build_index(folder / "run", IndexConfig(model=str(model_folder), projection_dim=6, rows_per_shard=9, data=data))
    return folder / "run"


@pytest.fixture(scope="module")
def model(model_folder: Path) -> LanguageModel:
    return load_model(str(model_folder))


def backward(model: LanguageModel, ids: list[list[int]]) -> None:
    """What a person writes: the model's own loss."""
    batch = torch.tensor(ids)
    model.model(batch, labels=batch, use_cache=False).loss.backward()
    model.model.zero_grad()


def test_search_by_matrix_and_by_modules_agree(index):
    attributor = Attributor(index, unit_norm=True)
    rows = attributor.store.block(0, 7)
    by_module = {
        name: torch.from_numpy(rows[:, columns]).unflatten(1, attributor.plan.shapes[name])
        for name, columns in attributor.plan.slices.items()
    }
    found = [attributor.search(queries, 4) for queries in (rows, torch.from_numpy(rows), by_module)]
    for each in found[1:]:
        assert np.array_equal(each.indices, found[0].indices)
        assert np.array_equal(each.scores, found[0].scores)
    assert found[0].indices.shape == (7, 4)


@pytest.mark.parametrize("unit_norm", [True, False])
def test_scores_are_inner_products_in_float64(unit_norm, index):
    attributor = Attributor(index, unit_norm=unit_norm)
    stored = attributor.store.block(0, 41).astype(np.float64)
    queries = np.random.default_rng(0).standard_normal((3, stored.shape[1])).astype(np.float32)
    expected = queries.astype(np.float64) @ stored.T
    if unit_norm:
        norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(queries.astype(np.float64), axis=1)[:, None]
        expected = np.divide(expected, norms, out=np.zeros_like(expected), where=norms > 0)
    found = attributor.search(queries, 41)
    order = np.argsort(-expected, axis=1, kind="stable")
    np.testing.assert_allclose(found.scores, np.take_along_axis(expected, order, 1), rtol=1e-6, atol=1e-7)
    opponents = attributor.search(queries, 41, reverse=True)
    np.testing.assert_allclose(opponents.scores, np.sort(expected, axis=1), rtol=1e-6, atol=1e-7)
    assert [hit.row for hit in found.opponents(1)] == opponents.indices[1].tolist()


def test_a_training_row_traced_is_its_own_best_proponent(index, model, texts, tokenizer):
    attributor = Attributor(index, unit_norm=True)
    rows = [1, 5, PLANTED, 20, 33]
    with attributor.trace(model.base, 3) as result:
        for row in rows:
            backward(model, [tokenizer(texts[row])["input_ids"]])
    assert len(result) == len(rows)
    assert result.indices[:, 0].tolist() == rows
    np.testing.assert_allclose(result.scores[:, 0], 1, atol=1e-5)
    assert result.proponents(0)[0].text == texts[1]


def test_a_planted_duplicate_ties_with_its_original(index, model, texts, tokenizer):
    for unit_norm in (True, False):
        attributor = Attributor(index, unit_norm=unit_norm)
        with attributor.trace(model.base, 41) as result:
            backward(model, [tokenizer("the hill in rain")["input_ids"]])
        scores = dict(zip(result.indices[0].tolist(), result.scores[0].tolist()))
        assert scores[40] == pytest.approx(scores[PLANTED], rel=1e-6, abs=1e-6 * max(map(abs, scores.values())))
    attributor = Attributor(index, unit_norm=True)
    with attributor.trace(model.base, 2) as result:
        backward(model, [tokenizer(texts[PLANTED])["input_ids"]])
    assert sorted(result.indices[0].tolist()) == [PLANTED, 40]
    assert result.scores[0][0] - result.scores[0][1] < 1e-6


def test_every_example_of_a_batch_is_a_query(index, model, texts, tokenizer):
    ids = [tokenizer(text)["input_ids"][:4] for text in texts[20:24]]
    assert {len(each) for each in ids} == {4}
    attributor = Attributor(index)
    with attributor.trace(model.base, 5) as one_by_one:
        for each in ids:
            backward(model, [each])
    with attributor.trace(model.base, 5) as together:
        backward(model, ids)
    assert np.array_equal(together.indices, one_by_one.indices)
    np.testing.assert_allclose(together.scores * 4, one_by_one.scores, rtol=1e-4)  # the loss is a mean over the batch


def test_patterns_restrict_the_score_to_modules(index, model, tokenizer):
    attributor = Attributor(index)
    name = list(attributor.plan.columns)[-1]
    queries = attributor.store.block(0, 2)
    expected = queries[:, attributor.store.columns[name]] @ attributor.store.block(0, 41, modules=[name]).T
    found = attributor.search(queries, 41, modules=name)
    np.testing.assert_allclose(found.scores, -np.sort(-expected, axis=1), rtol=1e-5, atol=1e-6)
    with attributor.trace(model.base, 3, modules=[name]) as result:
        backward(model, [tokenizer("the hill")["input_ids"]])
    assert len(result.proponents()) == 3
    with pytest.raises(SelectionError, match="matches no module"):
        attributor.search(queries, 1, modules="h.99.*")


def test_more_hits_than_rows_gives_all_rows(index):
    attributor = Attributor(index)
    assert attributor.search(attributor.store.block(0, 1), 1000).indices.shape == (1, 41)


def test_hits_resolve_to_the_record(index, texts):
    attributor = Attributor(index)
    for hit in attributor.search(attributor.store.block(3, 4), 41).proponents():
        assert hit.record == {"text": texts[hit.row]}
        assert hit.text == hit.column("text") == hit.column("no such column") == texts[hit.row]


def test_tracing_leaves_the_model_as_it_was(index, model, tokenizer):
    needs = [parameter.requires_grad for parameter in model.model.parameters()]
    with Attributor(index).trace(model.base):
        backward(model, [tokenizer("the hill")["input_ids"]])
    assert [parameter.requires_grad for parameter in model.model.parameters()] == needs
    assert not any(module._forward_hooks for module in model.model.modules())


def test_errors_inside_a_trace_come_out_and_undo_it(index, model):
    with pytest.raises(ZeroDivisionError), Attributor(index).trace(model.base):
        _ = 1 / 0
    assert not any(module._forward_hooks for module in model.model.modules())
    assert all(parameter.requires_grad for parameter in model.model.parameters())


def test_a_trace_without_a_backward_pass_is_refused(index, model):
    with pytest.raises(CaptureError, match="nothing was collected"), Attributor(index).trace(model.base):
        pass


def test_results_are_not_there_before_the_block_ends(index, model, tokenizer):
    with Attributor(index).trace(model.base) as result:
        backward(model, [tokenizer("the hill")["input_ids"]])
        with pytest.raises(RunError, match="when the trace block ends"):
            _ = result.scores


def test_queries_of_the_wrong_shape_are_refused(index):
    attributor = Attributor(index)
    row = attributor.store.row(0)
    for wrong in (row, row[None, :-1], np.full_like(row[None], np.nan)):
        with pytest.raises(InvalidInput):
            attributor.search(wrong)
    with pytest.raises(RunError, match="the query has no gradient for"):
        attributor.search({next(iter(attributor.plan.columns)): torch.zeros(1, 36)})


@pytest.fixture(scope="module")
def gpt2_index(folders: dict[str, Path], texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(dataset=str(folder / "data.jsonl"), truncation=False)
    config = IndexConfig(model=str(folders["gpt2"]), projection_dim=0, loss_reduction="sum", data=data)
    build_index(folder / "run", config)
    return folder / "run"


def test_other_weights_of_the_same_shape_are_refused(gpt2_index, folders):
    other = load_model(str(folders["gpt2-other"]))
    with pytest.raises(RunError, match="was made from other weights"), Attributor(gpt2_index).trace(other.base):
        raise AssertionError("the block must not run")
    with pytest.raises(RunError, match="was made from other weights"):
        Asker.open(gpt2_index, model=str(folders["gpt2-other"]))


def test_another_architecture_is_refused(gpt2_index, folders):
    other = load_model(str(folders["llama"]))
    with pytest.raises(RunError, match="was made from another model"), Attributor(gpt2_index).trace(other.base):
        raise AssertionError("the block must not run")


def test_a_single_changed_weight_is_another_model(gpt2_index, folders):
    model = load_model(str(folders["gpt2"]))
    with torch.no_grad():
        model.base.get_parameter("h.0.mlp.c_fc.weight")[0, 0] += 1e-3
    with pytest.raises(RunError, match="other weights"), Attributor(gpt2_index).trace(model.base):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_positive_score_is_a_proponent(architecture, folders, documents, tokenizer, tmp_path):
    """A step on the best proponent lowers the query's loss by its score, one on the worst opponent raises it."""
    query = tokenizer("the sea in rain")["input_ids"]
    store_model = load_model(str(folders[architecture]))
    config = IndexConfig(projection_dim=0)
    records = [{"text": text} for text in documents]
    store = collect_gradients(store_model, records, tmp_path / "run", tokenizer=tokenizer, config=config)
    attributor = Attributor(store)
    with attributor.trace(store_model.base, 1) as result:
        backward(store_model, [query])
    top, bottom = result.proponents()[0], result.opponents()[0]
    assert top.score > 0 > bottom.score
    for hit in (top, bottom):
        change, predicted = loss_change_of_a_step(folders[architecture], tokenizer(hit.text)["input_ids"], query)
        assert np.sign(change) == -np.sign(hit.score)
        assert change == pytest.approx(-predicted * hit.score, rel=0.05)


def loss_change_of_a_step(folder: Path, row: list[int], query: list[int], rate: float = 1e-4) -> tuple[float, float]:
    """The query's mean loss after minus before one SGD step on the row's summed loss, captured weights only."""
    model = load_model(str(folder))
    captured = [
        model.base.get_submodule(each.name).get_parameter("weight") for each in model.plan(IndexConfig()).modules
    ]
    model.model.double()

    def loss(ids: list[int]) -> torch.Tensor:
        batch = torch.tensor([ids])
        return model.model(batch, labels=batch, use_cache=False).loss

    before = loss(query).item()
    gradients = torch.autograd.grad(loss(row) * (len(row) - 1), captured)
    with torch.no_grad():
        for parameter, gradient in zip(captured, gradients):
            parameter -= rate * gradient
    return loss(query).item() - before, rate


def test_memory_and_disk_hold_the_same_gradients(gpt2_index, folders, texts, tokenizer, tmp_path):
    from attribute.data import TokenFileWriter, rows_of
    from attribute.index import source_of

    model = load_model(str(folders["gpt2"]))
    store = GradientStore.open(gpt2_index)
    rows = rows_of(source_of([{"text": text} for text in texts]), tokenizer, DataConfig(), model.context)
    tokens = TokenFileWriter(tmp_path, model.vocabulary).write(rows)
    plan = Attributor(store).plan
    found = gradients_of(model, tokens, plan)
    norms = np.linalg.norm(found, axis=1)
    assert (np.linalg.norm(found - store.block(0, 41), axis=1) <= 1e-6 * norms).all()
    with torch.no_grad():  # a notebook's habit does not break it
        assert np.array_equal(gradients_of(model, tokens, plan), found)


def test_a_text_asked_finds_itself(gpt2_index, texts):
    asker = Asker.open(gpt2_index)
    found = asker.ask([{"text": texts[7]}, {"text": texts[30]}], QueryConfig(top_k=2))
    assert found.indices[:, 0].tolist() == [7, 30]
    result = answer(found, [{"text": texts[7]}, {"text": texts[30]}])
    assert [each["query"] for each in result["queries"]] == [0, 1]
    assert [each["text"] for each in result["queries"]] == [texts[7], texts[30]]
    assert result["queries"][1]["proponents"][0]["row"] == 30
    assert set(result["queries"][1]["proponents"][0]) == {"row", "score", "text"}


def test_queries_are_asked_whole_whatever_the_index_left_out(folders, texts, tmp_path):
    """An index cut by --max-tokens or into chunks says nothing about how many queries there are."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, data in {"cut": {"max_tokens": 60}, "chunks": {"chunk_length": 8}}.items():
        config = IndexConfig(model=str(folders["gpt2"]), data=DataConfig(dataset=str(path), **data))
        build_index(tmp_path / name, config)
        found = Asker.open(tmp_path / name).ask([{"text": text} for text in texts[1:21]], QueryConfig(top_k=1))
        assert len(found) == 20


def test_queries_longer_than_the_context_follow_the_index(folders, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "the sea in rain"}\n')
    long = "ab" * 30  # 60 tokens, the model takes 48
    asked: dict[bool, Any] = {}
    for truncation in (False, True):
        data = DataConfig(dataset=str(path), truncation=truncation)
        build_index(tmp_path / str(truncation), IndexConfig(model=str(folders["gpt2"]), data=data))
        asked[truncation] = Asker.open(tmp_path / str(truncation))
    with pytest.raises(DataError, match="query 1 has 60 tokens, the model takes 48: shorten it"):
        asked[False].ask([{"text": "fine"}, {"text": long}], QueryConfig())
    cut = asked[True].ask([{"text": long}, {"text": long[:48]}], QueryConfig())
    assert cut.scores[0] == pytest.approx(cut.scores[1], rel=1e-6)


@pytest.mark.parametrize("text", ["", "s"])
def test_queries_without_loss_are_refused(text, gpt2_index):
    with pytest.raises(DataError, match=r"query 1 has . tokens, none with a loss"):
        Asker.open(gpt2_index).ask([{"text": "the sea"}, {"text": text}], QueryConfig())


def test_queries_may_name_their_columns_as_the_index_or_plainly(tmp_path):
    def source(*names: str):
        path = tmp_path / "queries.jsonl"
        path.write_text(json.dumps(dict.fromkeys(names, "x")) + "\n")
        return read_queries(path)

    pairs = DataConfig(prompt_column="q", completion_column="a")
    assert columns_for(source("q", "a"), pairs) == pairs
    assert columns_for(source("prompt", "completion"), pairs).completion_column == "completion"
    assert columns_for(source("text"), pairs).completion_column == ""
    assert columns_for(source("prompt", "completion"), DataConfig()).prompt_column == "prompt"
    chat = DataConfig(conversation_column="turns")
    assert columns_for(source("turns"), chat) == chat
    with pytest.raises(DataError, match="queries need a and q as the index has, or prompt and completion, or text"):
        columns_for(source("question"), pairs)


def test_query_options_out_of_range_are_refused():
    with pytest.raises(AttributionError, match="--top-k must be at least 1, not 0"):
        QueryConfig(top_k=0)


def test_an_index_whose_model_is_gone_is_refused(gpt2_index):
    with pytest.raises(ModelError, match="no model folder"):
        Asker.open(gpt2_index, model="./gone")


def test_a_store_that_no_build_made_is_refused(tmp_path):
    from gradstore import StoreWriter

    with StoreWriter.create(tmp_path / "s", rows=1, columns={"a": 1}, plan={}, side_columns=(), data=False) as writer:
        writer.write(0, np.ones((1, 1)), {})
    for attempt in (lambda: Attributor(tmp_path / "s"), lambda: Asker.open(tmp_path / "s")):
        with pytest.raises(RunError, match="holds a gradient store that no build made"):
            attempt()


def test_the_collector_of_gradcore_gives_what_a_search_takes(index, model, texts, tokenizer):
    attributor = Attributor(index, unit_norm=True)
    with GradientCollector(model.base, attributor.plan) as collector:
        backward(model, [tokenizer(texts[5])["input_ids"]])
    assert attributor.search(collector.gradients, 1).indices.tolist() == [[5]]
