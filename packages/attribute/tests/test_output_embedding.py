"""The output embedding among the captured modules: tied (GPT-2, Gemma), its own (GPT-NeoX, Llama), or soft-capped."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribute import Attributor, DataConfig, IndexConfig, LanguageModel, RunError, build_index, collect_gradients
from attribute.batching import assemble
from attribute.curvature import fit_kronecker
from attribute.curvature._gauss_newton import GaussNewton
from attribute.data import Row, TokenFile, TokenFileWriter
from attribute.engine import gradients_of
from attribute.index import announce
from attribute.model import load_model, load_tokenizer
from attribute.progress import Quiet
from attribute.scoring import ReduceConfig, ScoreConfig, reduce_gradients, score_dataset
from gradstore import GradientStore

EVERYTHING = IndexConfig(projection_dim=0, modules=("*",), include_bias=True)


class Notes(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def token_file(folder: Path) -> TokenFile:
    """Five rows of 3 to 11 tokens, some with a prompt."""
    made = []
    for number in range(5):
        length = 3 + (number * 5) % 9
        ids = np.random.default_rng(number).integers(2, 90, length)
        made.append(Row(ids, np.arange(length) >= number % 3, {}))
    return TokenFileWriter(folder, 300).write(made)


def autograd(model: LanguageModel, tokens: TokenFile, plan) -> np.ndarray:
    found = []
    for row in range(len(tokens)):
        batch = assemble(tokens, [row], model.device)
        model.model.zero_grad()
        logits = model.model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, batch.labels[0, 1:], reduction="sum").backward()
        parts = []
        for each in plan.modules:
            module = model.module(each.path)
            weight = module.weight.grad if module.weight.grad is not None else torch.zeros_like(module.weight)
            weight = weight.T if each.kind == "hf_conv1d" else weight.reshape(each.out_features, -1)
            if each.bias:
                weight = torch.cat([weight, module.bias.grad[:, None]], dim=1)
            parts.append(weight.flatten())
        found.append(torch.cat(parts).numpy())
    model.model.zero_grad()
    return np.stack(found)


def test_every_parameter_of_every_model(make_model, architecture, tmp_path):
    model = LanguageModel.wrap(make_model(architecture).eval())
    tokens, plan, notes = token_file(tmp_path), model.plan(EVERYTHING), Notes()
    announce(model, plan, notes)
    assert "they hold 100%" in notes.said[0]
    tied = model.model.config.tie_word_embeddings
    assert any("all its uses" in each for each in notes.said) is tied
    found = gradients_of(model, tokens, plan, budget=30)
    expected = autograd(model, tokens, plan)
    for columns in plan.slices.values():
        scale = np.abs(expected[:, columns]).max()
        assert np.abs(found[:, columns] - expected[:, columns]).max() <= 2e-5 * scale


def test_without_patterns_it_stays_outside(make_model):
    model, notes = LanguageModel.wrap(make_model("llama").eval()), Notes()
    plan = model.plan(IndexConfig(projection_dim=0))
    assert not set(model.outside) & set(plan.columns)
    announce(model, plan, notes)
    assert any("output embedding" in each for each in notes.said)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_gauss_newton_products_reach_every_parameter(make_model, architecture, tmp_path):
    """⟨y, H x⟩ = Σ_t dl_yᵀ (diag p − p pᵀ) dl_x / rows, with the changes dl of the logits by forward mode."""
    model = LanguageModel.wrap(make_model(architecture).eval())
    tokens, plan = token_file(tmp_path), model.plan(EVERYTHING)
    batch = assemble(tokens, [1, 3], model.device)
    matrix = GaussNewton(model, plan, [batch])
    x, y = torch.randn(2, plan.width, generator=torch.Generator().manual_seed(0))
    prefix = next(name for name, each in model.model.named_modules() if each is model.base)
    outside = {f"{path}.{kind}" for path in model.outside for kind in ("weight", "bias")}
    if model.model.config.tie_word_embeddings:
        outside = set()  # moved with the table it is tied to

    def change(direction):
        tangents = {
            name if name in outside else f"{prefix}.{name}": each[0]
            for name, each in matrix.directions(direction[None]).items()
            if outside or name.split(".")[0] not in model.outside
        }
        known = dict(model.model.named_parameters(remove_duplicate=False))

        def logits(parameters):
            given = {"input_ids": batch.input_ids, "use_cache": False}
            return torch.func.functional_call(model.model, parameters, kwargs=given).logits

        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.func.jvp(logits, ({name: known[name].detach() for name in tangents},), (tangents,))

    logits, dx = change(x)
    _, dy = change(y)
    counted = torch.zeros(batch.labels.shape, dtype=torch.bool)
    counted[:, :-1] = batch.labels[:, 1:] != -100
    p, dx, dy = logits[counted].softmax(-1), dx[counted], dy[counted]
    expected = ((dy * p * dx).sum() - ((dy * p).sum(-1) * (dx * p).sum(-1)).sum()) / 2
    found = matrix.multiply(x[None])[0] @ y
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-4)


def test_an_output_embedding_of_its_own_has_whole_factors(make_model, tmp_path):
    model = LanguageModel.wrap(make_model("gpt_neox").eval())
    tokens, plan = token_file(tmp_path), model.plan(EVERYTHING)
    (head,) = model.outside
    fitted = fit_kronecker(model, tokens, plan, "ekfac", labels="dataset")
    module = fitted.modules[head]
    assert module.out_vectors is not None
    rows = torch.from_numpy(gradients_of(model, tokens, plan))[:, plan.slices[head]]
    gradients = rows.reshape(len(rows), *module.eigenvalues.shape)
    torch.testing.assert_close(module.eigenvalues, module.rotate(gradients).square().mean(0), rtol=1e-3, atol=1e-6)
    once = fit_kronecker(model, tokens, plan, "kfac").multiply(np.ones((1, plan.width), np.float32))
    parts = fit_kronecker(model, tokens, plan, "kfac", partitions=5, budget=12)
    np.testing.assert_allclose(parts.multiply(np.ones((1, plan.width), np.float32)), once, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_scores_rows_and_tokens_agree(folders, documents, architecture, tmp_path):
    for name, texts in (("train", documents[:6]), ("query", documents[8:11])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = IndexConfig(
        model=str(folders[architecture]),
        projection_dim=0,
        modules=("*",),
        exclude=("wpe",) if architecture == "gpt2" else (),
        include_bias=True,
        token_batch_size=64,
        data=DataConfig(dataset=str(tmp_path / "train.jsonl")),
    )
    asked = IndexConfig(**{**vars(config), "data": DataConfig(dataset=str(tmp_path / "query.jsonl"))})
    rows, queries = (
        build_index(tmp_path / name, each).block(0, count).astype(np.float64)
        for name, each, count in (("train", config, 6), ("query", asked, 3))
    )
    expected = rows @ queries.T
    for name, score in (
        ("rows", ScoreConfig(str(tmp_path / "query"))),
        ("tokens", ScoreConfig(str(tmp_path / "query"), tokens="gradient")),
        ("outputs", ScoreConfig(str(tmp_path / "query"), tokens="output")),
    ):
        scores = score_dataset(tmp_path / name, score, IndexConfig(**{**vars(config), "projection_dim": None})).scores
        found = scores.block(0, scores.store.rows)
        if score.tokens:
            found = np.stack([found[a:b].sum(0) for a, b in pairwise(scores.store.offsets)])
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected), name
    reduce_gradients(tmp_path / "mean", ReduceConfig(method="mean"), asked)
    mean = GradientStore.open(tmp_path / "mean").block(0, 1)
    np.testing.assert_allclose(mean[0], queries.mean(0), rtol=1e-3, atol=1e-4)


def test_a_trace_of_the_whole_model_asks_an_index_with_it(folders, documents, tmp_path):
    model = load_model(str(folders["gpt_neox"]))
    tokenizer = load_tokenizer(str(folders["gpt_neox"]))
    records = [{"text": text} for text in documents[:8]]
    collect_gradients(
        model, records, tmp_path / "run", tokenizer=tokenizer, config=IndexConfig(projection_dim=4, modules=("*",))
    )
    attr = Attributor(tmp_path / "run", unit_norm=True)
    ids = tokenizer(documents[5], return_tensors="pt")["input_ids"]
    with attr.trace(model.model, 3) as result:
        model.model(ids, labels=ids).loss.backward()
    assert result.indices[0, 0] == 5
    assert result.scores[0, 0] == pytest.approx(1, abs=1e-4)
    with pytest.raises(RunError, match="pass the whole model"), attr.trace(model.base, 3):
        pass
