"""Curvatures equal their definitions, written out over whole gradients, however rows are batched."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attribute import AttributionError, DataConfig, IndexConfig, LanguageModel, RunError, collect_gradients
from attribute.batching import assemble
from attribute.curvature import (
    METHODS,
    Gram,
    Inversion,
    Kronecker,
    fit_kronecker,
    gram_of_store,
    load_curvature,
    mixing_weight,
    trackstar,
)
from attribute.curvature._factors import Factors
from attribute.curvature._fit import _Correction, _Moments
from attribute.curvature._labels import losses_under
from attribute.data import Row, TokenFile, TokenFileWriter
from attribute.engine import gradients_of
from gradcore import CapturePlan, TwoSided

RELATIVE = 2e-4  # float32 sums in another order, through an inverse of condition 10


def token_file(folder: Path, rows: int = 7) -> TokenFile:
    """Rows of 2 to 14 tokens of which a prefix may be a prompt; the last row has no loss."""
    made = []
    for number in range(rows):
        length = 2 + (number * 5) % 13
        labelled = np.arange(length) >= number % 3
        made.append(
            Row((np.arange(length) * (number + 3) % 90 + 2), labelled if number < rows - 1 else labelled & 0, {})
        )
    return TokenFileWriter(folder, 300).write(made)


@pytest.fixture(scope="module")
def study(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, TokenFile, CapturePlan]:
    model = LanguageModel.wrap(make_model("gpt2").eval())
    tokens = token_file(tmp_path_factory.mktemp("tokens"))
    return model, tokens, model.plan(IndexConfig(projection_dim=0, modules=("*",), include_bias=True))


def close(found: np.ndarray | Tensor, expected: np.ndarray | Tensor, relative: float = RELATIVE) -> None:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def factors_by_hooks(study: tuple, name: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Inputs and output gradients of one linear module at the tokens before the last label, one row at a time."""
    model, tokens, _ = study
    given, grads, whole = [], [], []
    module = model.base.get_submodule(name)
    for row in range(len(tokens) - 1):
        seen: list[Tensor] = []

        def hook(_: Any, args: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            output.retain_grad()
            seen.extend((args[0], output))

        handle = module.register_forward_hook(hook)
        batch = assemble(tokens, [row], model.device)
        model.losses(batch.input_ids, batch.labels).sum().backward()
        handle.remove()
        last = int(np.flatnonzero(tokens.labelled(row)).max())
        a, g = seen[0][0, :last].detach(), seen[1].grad[0, :last]
        given.append(torch.cat((a, torch.ones(last, 1)), dim=1))
        grads.append(g)
        whole.append(g.T @ given[-1])
    return torch.cat(given), torch.cat(grads), whole


@pytest.mark.parametrize("method", ["kfac", "tkfac", "shampoo"])
def test_factors_are_their_definition(study, method):
    model, tokens, plan = study
    a, g, whole = factors_by_hooks(study, "h.0.mlp.c_fc")  # a Conv1D of 16 × 64
    found = fit_kronecker(model, tokens, plan, method, labels="dataset").modules["h.0.mlp.c_fc"]
    mean_a, mean_g = (a**2).sum(1, keepdim=True), (g**2).sum(1, keepdim=True)
    per_row = len(a) / len(whole)
    out, given, scale = {
        "kfac": (g.T @ g / len(g), a.T @ a / len(a), per_row),
        "tkfac": ((g * mean_a).T @ g / len(g), (a * mean_g).T @ a / len(a), per_row / (mean_a * mean_g).mean().item()),
        "shampoo": (
            sum(G @ G.T for G in whole) / len(whole),
            sum(G.T @ G for G in whole) / len(whole),
            len(whole) / sum((G**2).sum().item() for G in whole),
        ),
    }[method]
    assert out.shape == (64, 64)
    assert given.shape == (17, 17)
    for values, vectors, expected in (
        (found.out_values, found.out_vectors, out),
        (found.in_values, found.in_vectors, given),
    ):
        close((vectors * values) @ vectors.T, expected, 1e-4)
    assert found.scale == pytest.approx(scale, rel=1e-4)
    # The trace of the product is the trace of the Fisher of a row, taken token by token (K-FAC only approximates it).
    if method == "tkfac":
        assert found.eigenvalues.sum().item() == pytest.approx(per_row * (mean_a * mean_g).mean().item(), rel=1e-4)
    if method == "shampoo":
        assert found.eigenvalues.sum().item() == pytest.approx(
            sum((G**2).sum().item() for G in whole) / len(whole), rel=1e-4
        )


def test_corrected_eigenvalues_are_second_moments_in_the_eigenbasis(study):
    """Of every module: tables, norms and matrices with their biases."""
    model, tokens, plan = study
    curvature = fit_kronecker(model, tokens, plan, "ekfac", labels="dataset")
    rows = torch.from_numpy(gradients_of(model, tokens, plan))[:-1]
    assert curvature.rows == len(rows)
    assert set(curvature.modules) == set(plan.columns)
    for name, module in curvature.modules.items():
        gradients = rows[:, plan.slices[name]].reshape(len(rows), *module.eigenvalues.shape)
        close(module.eigenvalues, module.rotate(gradients).square().mean(0), 1e-4)
        close(module.rotate(module.rotate(gradients), back=True), gradients, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_neither_batches_nor_partitions_matter(study, method):
    """With labels sampled, too: a draw belongs to its row and place."""
    model, tokens, plan = study
    probe = np.random.default_rng(0).normal(size=(3, plan.width)).astype(np.float32)
    once = fit_kronecker(model, tokens, plan, method).multiply(probe)
    close(fit_kronecker(model, tokens, plan, method, budget=15, partitions=3).multiply(probe), once)


def test_another_seed_draws_other_labels(study):
    model, tokens, plan = study
    one, two = (fit_kronecker(model, tokens, plan, "kfac", seed=seed).modules["h.0.mlp.c_fc"] for seed in (0, 1))
    assert not torch.allclose(one.out_values, two.out_values)
    torch.testing.assert_close(one.in_values, two.in_values)


def test_sampled_labels_follow_the_model(study):
    """Mean loss under sampled labels is the entropy, within five standard errors."""
    model, tokens, plan = study
    batch = assemble(tokens, [4, 5], model.device)
    with torch.no_grad():
        logits = model.model(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
        drawn = torch.stack([losses_under(model, batch, "sampled", seed, plan) for seed in range(300)])
    entropy = torch.where(batch.labels[:, 1:] != -100, -(logits.exp() * logits).sum(-1), 0).sum(1)
    error = drawn.std(0) / 300**0.5
    assert ((drawn.mean(0) - entropy).abs() < 5 * error).all()


def test_ekfac_is_the_exact_inverse_for_a_linear_regression():
    """y = W x + noise of variance one: the Gauss-Newton matrix is I ⊗ E[x xᵀ]. Targets one deviation off in each
    direction have exactly that second moment."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64).repeat_interleave(3, 0)
    g = (3**0.5 * torch.eye(3, dtype=torch.float64)).repeat(20, 1)
    factors = Factors("w", g[:, None], x[:, None], torch.arange(60))
    moments = _Moments("kfac", (3, 5))
    moments.add(factors)
    correction = _Correction(moments.finish(60), (3, 5))
    correction.add(factors)
    plan = CapturePlan.for_model(torch.nn.Sequential(torch.nn.Linear(5, 3)))
    dense = torch.kron(torch.eye(3, dtype=torch.float64), x.T @ x / 60)
    query = torch.randn(4, 15, generator=generator, dtype=torch.float64)
    for module, exact in ((moments.finish(60), 1e-8), (correction.finish(60), 1e-8)):
        curvature = Kronecker(plan, "ekfac", "sampled", 60, {"0": module})
        for kind in ("absolute", "damped"):
            damping = 0.1 * (dense.trace().item() / 15 if kind == "damped" else 1)
            expected = torch.linalg.solve(dense + damping * torch.eye(15, dtype=torch.float64), query.T).T
            close(curvature.apply(query, Inversion(kind, 0.1)), expected, exact)


def test_sketched_factors_are_those_of_the_sketched_sides(study):
    """Small enough for any model: three r × r matrices a module."""
    model, tokens, _ = study
    sketched = model.plan(IndexConfig(projection_dim=4))
    curvature = fit_kronecker(model, tokens, sketched, "ekfac", labels="dataset")
    rows = torch.from_numpy(gradients_of(model, tokens, sketched))[:-1]
    assert isinstance(sketched.sketch, TwoSided)
    for name, module in curvature.modules.items():
        assert module.out_vectors.shape == module.in_vectors.shape == module.corrected.shape == (4, 4)
        gradients = rows[:, sketched.slices[name]].reshape(-1, 4, 4)
        close(module.eigenvalues, module.rotate(gradients).square().mean(0), 1e-4)


@pytest.mark.parametrize("kind", ["damped", "absolute", "tikhonov", "pseudo-inverse"])
def test_inverse_square_root_twice_is_the_inverse(study, kind):
    model, tokens, plan = study
    curvature = fit_kronecker(model, tokens, plan, "ekfac")
    rows = gradients_of(model, tokens, plan)
    half = Inversion(kind, 0.2, -0.5)
    close(curvature.apply(curvature.apply(rows, half), half), curvature.apply(rows, Inversion(kind, 0.2)))


def test_inversions_are_their_formulas():
    values = torch.tensor([0.0, 1.0, 5.0])
    for kind, expected in {
        "damped": [1.0, 1 / 2, 1 / 6],  # the mean is 2, half of it 1
        "absolute": [2.0, 1 / 1.5, 1 / 5.5],
        "tikhonov": [0.0, 1 / 2, 5 / 26],
        "pseudo-inverse": [0.0, 0.0, 1 / 5],
    }.items():
        close(Inversion(kind, 0.5).of(values), np.array(expected), 1e-12)
    out, given = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0])
    # √(c m) = √(0.5 · 8) = 2 and π² = 4 / 2
    expected = np.outer(1 / (np.array([1, 3]) + 2 / 2**0.5), 1 / (np.array([2, 6]) + 2 * 2**0.5))
    close(Inversion("factored", 0.5).of_factors(out, given), expected, 1e-12)
    assert not Inversion().of(torch.zeros(3)).any()


def test_inversions_refuse_what_they_cannot_do(study):
    model, tokens, plan = study
    with pytest.raises(AttributionError, match="singular and --damping is 0"):
        Inversion("damped", 0.0).of(torch.tensor([0.0, 1.0]))
    with pytest.raises(AttributionError, match="both Kronecker factors"):
        fit_kronecker(model, tokens, plan.restrict("h.0.mlp.c_fc"), "ekfac").apply(
            np.zeros((1, 64 * 17)), Inversion("factored")
        )
    for arguments in (("bogus",), ("damped", -1.0), ("damped", 0.1, 2.0)):
        with pytest.raises(AttributionError):
            Inversion(*arguments)
    with pytest.raises(AttributionError, match="--module-partitions"):
        fit_kronecker(model, tokens, plan, partitions=99)


def test_a_sidecar_comes_back_and_a_torn_one_does_not(study, tmp_path):
    model, tokens, plan = study
    fitted = fit_kronecker(model, tokens, plan, "ekfac")
    fitted.save(tmp_path / "h")
    rows = gradients_of(model, tokens, plan)
    again = load_curvature(tmp_path / "h")
    assert isinstance(again, Kronecker)
    assert (again.plan, again.rows, again.method) == (fitted.plan, fitted.rows, "ekfac")
    for _ in range(2):  # nothing is applied in place
        np.testing.assert_array_equal(again.apply(rows, Inversion()), fitted.apply(rows, Inversion()))
    data = (tmp_path / "h" / "curvature.safetensors").read_bytes()
    (tmp_path / "h" / "curvature.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunError, match="torn or changed"):
        load_curvature(tmp_path / "h")
    about = json.loads((tmp_path / "h" / "curvature.json").read_text())
    (tmp_path / "h" / "curvature.json").write_text(json.dumps(about | {"version": 2}))
    with pytest.raises(RunError, match="version 2"):
        load_curvature(tmp_path / "h")
    with pytest.raises(RunError, match="no finished curvature"):
        load_curvature(tmp_path)


@pytest.fixture(scope="module")
def sides(folders, documents, tokenizer, tmp_path_factory):
    from attribute.model import load_model

    root, model = tmp_path_factory.mktemp("stores"), load_model(str(folders["llama"]))
    config = IndexConfig(projection_dim=3)
    made = {}
    for name, texts in (("train", documents), ("query", documents[3:9])):
        records = [{"text": text} for text in texts]
        made[name] = collect_gradients(model, records, root / name, tokenizer=tokenizer, config=config)
    return made["train"], made["query"]


@pytest.mark.parametrize("joint", [False, True])
def test_gram_is_the_second_moment_of_rows_with_a_gradient(sides, joint, tmp_path):
    store, _ = sides
    gram = gram_of_store(store, joint=joint)
    rows = store.block(0, store.rows).astype(np.float64)
    rows = rows[rows.any(1)]
    assert gram.rows == len(rows)
    damped = np.zeros((store.width, store.width))
    for columns in [slice(0, store.width)] if joint else gram.plan.slices.values():
        moment = rows[:, columns].T @ rows[:, columns] / len(rows)
        damped[columns, columns] = np.linalg.inv(moment + 0.1 * np.trace(moment) / len(moment) * np.eye(len(moment)))
    close(gram.apply(rows.astype(np.float32), Inversion()), rows @ damped)
    gram.save(tmp_path / "gram")
    loaded = load_curvature(tmp_path / "gram")
    assert isinstance(loaded, Gram)
    assert loaded.joint == joint
    close(loaded.apply(rows.astype(np.float32), Inversion()), rows @ damped)


def test_mixing_weighs_both_sides_alike_at_the_chosen_component(sides):
    train, query = (gram_of_store(store) for store in sides)
    weight = mixing_weight(train, query, 5)
    assert 0 < weight < 1
    fifth = [np.sort(np.concatenate([each.numpy() for each in side.values.values()]))[-5] for side in (train, query)]
    assert weight * fifth[1] == pytest.approx((1 - weight) * fifth[0], rel=1e-9)
    mixed = query.mix(train, weight)
    for name in mixed.values:
        close(mixed.moment(name), weight * query.moment(name) + (1 - weight) * train.moment(name), 1e-9)


def test_too_few_queries_show_no_common_task(sides):
    """R of a handful of queries is what each of them asks: marking it down would mark down the answer."""
    train, query = (gram_of_store(store) for store in sides)
    directions = round(train.plan.width * 1000 / 65536)
    assert directions > 1
    assert mixing_weight(train, replace(query, rows=directions - 1)) == 0
    assert mixing_weight(train, replace(query, rows=directions)) > 0
    assert mixing_weight(train, replace(query, rows=1), 5) == mixing_weight(train, query, 5)  # who asks for it gets it


def trackstar_reference(train: np.ndarray, query: np.ndarray, slices: list[slice], components: int) -> np.ndarray:
    """R^-½ on both sides, then cosines over all modules: the paper's order of operations."""
    moments = [[side[:, s].T @ side[:, s] / len(side) for s in slices] for side in (train, query)]
    tops = [np.sort(np.concatenate([np.linalg.eigvalsh(m) for m in side]))[-components] for side in moments]
    weight = tops[0] / (tops[0] + tops[1])
    sides = [side.copy() for side in (train, query)]
    for place, columns in enumerate(slices):
        values, vectors = np.linalg.eigh(weight * moments[1][place] + (1 - weight) * moments[0][place])
        root = (vectors / np.sqrt(values + 0.1 * values.mean())) @ vectors.T
        for side in sides:
            side[:, columns] = side[:, columns] @ root
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides]
    return unit[1] @ unit[0].T


def test_trackstar_is_its_formula(folders, documents, tmp_path):
    texts = [text for text in documents if len(text) > 8]  # rows without loss have no cosine
    for name, chosen in (("train", texts), ("query", texts[3:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    config = IndexConfig(
        model=str(folders["llama"]), projection_dim=3, data=DataConfig(dataset=str(tmp_path / "train.jsonl"))
    )
    query = DataConfig(dataset=str(tmp_path / "query.jsonl"))
    found = trackstar(tmp_path / "run", config, query, components=5)
    plan = gram_of_store(found.index).plan
    expected = trackstar_reference(
        found.index.block(0, found.index.rows).astype(np.float64),
        found.queries.block(0, found.queries.rows).astype(np.float64),
        list(plan.slices.values()),
        5,
    )
    close(found.scores.block(0, found.index.rows).T, expected)
    answer = found.answer()
    assert [each["proponents"][0]["text"] for each in answer["queries"]] == texts[3:9]  # each query is a training row
    with pytest.raises(RunError, match="finished run"):
        trackstar(tmp_path / "run", config, query)
    with pytest.raises(AttributionError, match="--top-k must be at least 1"):
        trackstar(tmp_path / "run", config, query, top_k=0)
    with pytest.raises(AttributionError, match="needs a sketch"):
        trackstar(tmp_path / "other", IndexConfig(projection_dim=0), query)


def test_an_interrupted_trackstar_takes_up_nothing_stale(folders, documents, tmp_path, save_model):
    """What is finished is kept, unless its data or its model has changed since."""
    texts = [text for text in documents if len(text) > 8][:9]
    data = tmp_path / "train.jsonl"

    def write(rows):
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))

    write(texts)
    shutil.copytree(folders["llama"], tmp_path / "model")
    config = IndexConfig(model=str(tmp_path / "model"), projection_dim=3, data=DataConfig(dataset=str(data)))
    run, query = tmp_path / "run", replace(config.data, split="train[:2]")
    whole = trackstar(run, config, query).scores.block(0, 9)
    index = (run / "index" / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(run / "scores")
    assert np.array_equal(trackstar(run, config, query).scores.block(0, 9), whole)
    assert (run / "index" / "manifest.json").stat().st_mtime_ns == index
    shutil.rmtree(run / "scores")
    write(texts[:5])
    with pytest.raises(RunError, match="index was begun with other tokens"):
        trackstar(run, config, query)
    write([*texts[:8], texts[0]])
    with pytest.raises(RunError, match="index was begun with other tokens"):
        trackstar(run, config, query)
    write(texts)
    with pytest.raises(RunError, match="index was begun with --projection-dim 3, not 2"):
        trackstar(run, replace(config, projection_dim=2), query)
    save_model(tmp_path / "model", "llama", seed=3)
    with pytest.raises(RunError, match="index was begun with other weights"):
        trackstar(run, config, query)
    write(texts[:5])
    assert trackstar(run, config, query, overwrite=True).index.rows == 5


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo"])
def test_experts_have_a_curvature_that_knows_no_batches(method, tmp_path):
    """Tokens of an expert are counted, not the places that a batch leaves empty for them."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        max_position_embeddings=48,
    )
    whole = hf.AutoModelForCausalLM.from_config(config)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = LanguageModel.wrap(whole.eval())
    plan = model.plan(IndexConfig(projection_dim=0, modules=("*.experts",)))
    rows = (Row(np.arange(3, 3 + length) * 7 % 290 + 2, np.arange(length) > 0, {}) for length in (5, 9, 12, 4, 7))
    tokens = TokenFileWriter(tmp_path, 300).write(rows)
    probe = np.random.default_rng(0).normal(size=(2, plan.width)).astype(np.float32)
    found = [
        fit_kronecker(model, tokens, plan, method, labels="dataset", budget=budget).multiply(probe)
        for budget in (12, 999)
    ]
    close(found[0], found[1])
    if method == "kfac":  # by hand: means over the tokens of each expert that have a gradient
        name = plan.modules[0].name
        gradients = gradients_of(model, tokens, plan)
        assert np.isfinite(gradients).all()
        assert np.abs(found[0][:, plan.slices[name]]).max() > 0
