"""reduce and score: every route gives G_train Gᵀ_query of gradients that were written out."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from attribute import AttributionError, DataConfig, DataError, IndexConfig, RunError, build_index
from attribute.curvature import Inversion, fit_hessian, fit_preconditioners
from attribute.model import load_model, load_tokenizer
from attribute.scoring import ReduceConfig, ScoreConfig, reduce_gradients, score_dataset
from gradstore import GradientStore, ScoreStore


@pytest.fixture(scope="module")
def world(folders, documents, tmp_path_factory):
    """Train and query data, a model, and their whole gradients."""
    root = tmp_path_factory.mktemp("scoring")
    for name, texts in (("train", documents[:14]), ("query", documents[14:19])):
        lines = (json.dumps({"text": text, "kind": "ab"[n % 2]}) for n, text in enumerate(texts))
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    config = IndexConfig(
        model=str(folders["gpt2"]),
        projection_dim=0,
        modules=("*",),
        exclude=("wpe",),
        include_bias=True,
        rows_per_shard=5,
        token_batch_size=64,
        data=DataConfig(dataset=str(root / "train.jsonl")),
    )
    asked = replace(config, data=replace(config.data, dataset=str(root / "query.jsonl")))
    build_index(root / "train", config)
    build_index(root / "query", asked)
    return root, replace(config, projection_dim=None), asked


def rows(root, name) -> np.ndarray:
    store = GradientStore.open(root / name)
    return store.block(0, store.rows).astype(np.float64)


def unit(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def scored(tmp_path, config, **options) -> np.ndarray:
    found = score_dataset(tmp_path / "scores", ScoreConfig(**options), config, overwrite=True)
    return found.scores.block(0, found.scores.store.rows)


@pytest.mark.parametrize("method", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sketch", [{}, {"projection_dim": 3}, {"projection_dim": None, "sketch_kind": "tensor"}])
def test_reduce_is_the_mean_or_sum_of_the_rows(world, tmp_path, method, normalize, sketch):
    _, _, asked = world
    asked = replace(asked, **sketch, sketch_floats=16)
    given = rows(tmp_path, "rows") if build_index(tmp_path / "rows", asked) else None
    given = unit(given) if normalize else given
    store = reduce_gradients(tmp_path / "out", ReduceConfig(method, normalize), asked)
    close(store.block(0, 1), (given.mean(0) if method == "mean" else given.sum(0))[None])
    assert store.data(0)["rows"] == 5


@pytest.mark.parametrize("sketch", [{}, {"projection_dim": 3}])
def test_a_group_has_a_query_of_its_own(world, tmp_path, sketch):
    _, _, asked = world
    asked = replace(asked, **sketch)
    build_index(tmp_path / "rows", asked)
    given = unit(rows(tmp_path, "rows"))
    store = reduce_gradients(tmp_path / "out", ReduceConfig("mean", True, "kind"), asked)
    assert [store.data(row)["group"] for row in range(2)] == ["a", "b"]
    close(store.block(0, 2), np.stack([given[0::2].mean(0), given[1::2].mean(0)]))
    with pytest.raises(DataError, match="no column 'colour', only text, kind"):
        reduce_gradients(tmp_path / "x", ReduceConfig(group_column="colour"), asked)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("query_rows", [0, 2])
def test_scores_are_products_of_the_gradients(world, tmp_path, normalize, query_rows):
    root, config, _ = world
    train, query = rows(root, "train"), rows(root, "query")
    if normalize:
        train, query = unit(train), unit(query)
    options = {"query_path": str(root / "query"), "unit_normalize": normalize, "query_rows": query_rows}
    close(scored(tmp_path, config, **options), train @ query.T)
    close(scored(tmp_path, config, score="mean", **options), train @ query.mean(0)[:, None])
    close(scored(tmp_path, config, score="nearest", **options), (train @ query.T).max(1, keepdims=True))


@pytest.mark.parametrize("sketch", ["two-sided", "tensor", "spectral", "global"])
def test_sketched_queries_meet_sketched_rows(world, tmp_path, sketch):
    _, config, asked = world
    kind = {"projection_dim": None, "sketch_kind": sketch, "sketch_floats": 16}
    build_index(tmp_path / "query", replace(asked, **kind))
    found = scored(tmp_path, config, query_path=str(tmp_path / "query"), unit_normalize=True)
    query = rows(tmp_path, "query")
    again = scored(tmp_path, replace(config, data=asked.data), query_path=str(tmp_path / "query"))
    close(again, query @ query.T, 1e-3)
    assert np.abs(found).max() <= 1 + 1e-5


def test_normalised_queries_meet_normalised_rows(world, tmp_path):
    """adam scales every entry, so that gradients come formed in blocks."""
    _, config, asked = world
    for kind in ("adam", "adafactor"):
        build_index(tmp_path / kind, replace(asked, normalizer=kind))
        query = rows(tmp_path, kind)
        again = replace(config, data=asked.data)
        close(scored(tmp_path, again, query_path=str(tmp_path / kind)), query @ query.T, 1e-3)
        close(
            scored(tmp_path, again, query_path=str(tmp_path / kind), unit_normalize=True),
            unit(query) @ unit(query).T,
            1e-3,
        )


def test_chosen_modules_alone_count(world, tmp_path):
    root, config, _ = world
    store = GradientStore.open(root / "train")
    names = [name for name in store.columns if "mlp" in name]
    train, query = (
        GradientStore.open(root / side).block(0, count, names) for side, count in (("train", 14), ("query", 5))
    )
    close(scored(tmp_path, config, query_path=str(root / "query"), modules=("*mlp*",)), train @ query.T)


def test_scores_of_modules_sum_to_the_total(world, tmp_path):
    root, config, _ = world
    parts = [("*attn*",), ("*mlp*",), ("wte", "*ln_*")]
    store = GradientStore.open(root / "train")
    total = scored(tmp_path, config, query_path=str(root / "query"))
    found = [scored(tmp_path, config, query_path=str(root / "query"), modules=each) for each in parts]
    assert all(np.linalg.norm(each) > 0.01 * np.linalg.norm(total) for each in found)
    assert not [name for name in store.columns if not any(word in name for word in ("attn", "mlp", "wte", "ln_"))]
    close(sum(found), total)


def test_low_rank_queries_keep_what_the_rank_keeps(world, tmp_path):
    root, config, _ = world
    store, train = GradientStore.open(root / "query"), rows(root, "train")
    from attribute.spectral import plan_of

    plan, cut = plan_of(store), torch.from_numpy(rows(root, "query"))
    for name, columns in plan.slices.items():
        matrices = cut[:, columns].unflatten(1, plan.shapes[name])
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        cut[:, columns] = ((u[..., :2] * s[:, None, :2]) @ v[:, :2]).flatten(1)
    full = scored(tmp_path, config, query_path=str(root / "query"), query_rank=16)
    close(full, train @ rows(root, "query").T)
    low = scored(tmp_path, config, query_path=str(root / "query"), query_rank=2)
    # Modules with a side too small for the factors to be smaller are kept whole.
    whole = [name for name in plan.shapes if 2 * sum(plan.shapes[name]) >= np.prod(plan.shapes[name])]
    for name in whole:
        cut[:, plan.slices[name]] = torch.from_numpy(rows(root, "query"))[:, plan.slices[name]]
    close(low, train @ cut.numpy().T)


@pytest.mark.parametrize("kind", ["gram", "ekfac"])
def test_a_curvature_preconditions_the_queries(world, tmp_path, kind):
    root, config, asked = world
    plain = replace(config, projection_dim=0, modules=("h.*.mlp.*",), exclude=(), include_bias=False)
    asked = replace(plain, data=asked.data)
    if kind == "gram":
        plain, asked = replace(plain, projection_dim=3), replace(asked, projection_dim=3)
        curvature = fit_preconditioners(tmp_path / "curvature", plain)
    else:
        curvature = fit_hessian(tmp_path / "curvature", plain, labels="dataset")
    build_index(tmp_path / "query", asked)
    build_index(tmp_path / "train", plain)
    expected = (
        rows(tmp_path, "train")
        @ curvature.apply(GradientStore.open(tmp_path / "query").block(0, 5), Inversion("damped", 0.2)).T
    )
    found = scored(
        tmp_path,
        replace(plain, projection_dim=None),
        query_path=str(tmp_path / "query"),
        curvature_path=str(tmp_path / "curvature"),
        inversion=Inversion("damped", 0.2),
    )
    close(found, expected, 1e-3)
    with pytest.raises(Exception, match="modules differs"):
        scored(tmp_path, config, query_path=str(root / "query"), curvature_path=str(tmp_path / "curvature"))


@pytest.mark.parametrize("tokens", ["gradient", "output"])
def test_scores_of_tokens_sum_to_that_of_their_row(world, tmp_path, tokens):
    root, config, _ = world
    found = score_dataset(tmp_path / "t", ScoreConfig(str(root / "query"), tokens=tokens), config)
    store = found.scores.store
    values, offsets = found.scores.block(0, store.rows), store.offsets
    sums = np.stack([values[a:b].sum(0) for a, b in pairwise(offsets)])
    close(sums, rows(root, "train") @ rows(root, "query").T)
    assert store.rows == offsets[-1] > 14
    assert found.texts[int(found.hits.top_rows[0, 0])].startswith("[")


def test_output_scores_are_of_each_tokens_own_loss(world, tmp_path, folders):
    """By autograd: the gradient of one token's loss, times the query."""
    root, config, _ = world
    found = score_dataset(tmp_path / "t", ScoreConfig(str(root / "query"), tokens="output"), config)
    model, tokenizer = load_model(str(folders["gpt2"])), load_tokenizer(str(folders["gpt2"]))
    from attribute.spectral import plan_of

    plan, query = plan_of(GradientStore.open(root / "query")), torch.from_numpy(rows(root, "query")).float()
    text = json.loads((root / "train.jsonl").read_text().splitlines()[2])["text"]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    start = int(found.scores.store.offsets[2])
    for place in (1, 3, ids.shape[1] - 1):
        labels = torch.full_like(ids, -100)
        labels[0, place] = ids[0, place]
        with model.collector(plan) as collector:
            model.losses(ids, labels).sum().backward()
        expected = (collector.rows @ query.T)[0].numpy()
        close(found.scores.block(start + place, start + place + 1)[0], expected, 1e-3)


def test_a_killed_run_is_continued_and_has_the_same_bytes(world, tmp_path, monkeypatch):
    root, config, _ = world
    from attribute.engine import MatrixSink

    for tokens in ("", "gradient"):
        score = ScoreConfig(str(root / "query"), tokens=tokens)
        score_dataset(tmp_path / f"whole{tokens}", score, config)
        closed, real = [], MatrixSink.close

        def dying(self, closed=closed, real=real):
            real(self)
            closed.append(1)
            if len(closed) == 2:
                raise KeyboardInterrupt

        path = tmp_path / f"part{tokens}"
        with monkeypatch.context() as patch:
            patch.setattr(MatrixSink, "close", dying)
            with pytest.raises(KeyboardInterrupt):
                score_dataset(path, score, config)
        assert not GradientStore.open(path, partial=True).complete
        with pytest.raises(Exception, match="plan"):
            score_dataset(path, replace(score, score="mean"), config)
        score_dataset(path, score, config)
        one, two = (ScoreStore.open(tmp_path / f"{name}{tokens}") for name in ("whole", "part"))
        assert np.array_equal(one.block(0, one.store.rows), two.block(0, two.store.rows))
        with pytest.raises(RunError, match="finished run"):
            score_dataset(path, score, config)


def test_queries_without_a_gradient_count_for_nothing(world, tmp_path):
    """Their own scores are 0; neither mean nor nearest knows them."""
    root, config, asked = world
    store, empty = GradientStore.open(root / "query"), tmp_path / "empty"
    records = [store.data(row) for row in range(3)] + [{"text": "t"}]  # one token has no loss
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": each["text"]}) for each in records))
    build_index(empty, replace(asked, data=replace(asked.data, dataset=str(tmp_path / "few.jsonl"))))
    train, query = unit(rows(root, "train")), unit(rows(root, "query")[:3])
    options = {"query_path": str(empty), "unit_normalize": True}
    close(scored(tmp_path, config, **options), np.pad(train @ query.T, ((0, 0), (0, 1))))
    close(scored(tmp_path, config, score="mean", **options), train @ query.mean(0)[:, None])
    close(scored(tmp_path, config, score="nearest", **options), (train @ query.T).max(1, keepdims=True))
    nothing = replace(asked, data=replace(asked.data, dataset=str(tmp_path / "few.jsonl"), split="train[3:]"))
    with pytest.raises(DataError, match="none of the 1 rows"):
        reduce_gradients(tmp_path / "nothing", ReduceConfig(), nothing)


def test_bad_input_is_refused(world, tmp_path, folders):
    root, config, asked = world
    query = str(root / "query")
    with pytest.raises(AttributionError, match="query-path is missing"):
        ScoreConfig()
    with pytest.raises(AttributionError, match="cosines do not"):
        ScoreConfig(query, tokens="gradient", unit_normalize=True)
    with pytest.raises(RunError, match="made from another model"):
        scored(tmp_path, replace(config, model=str(folders["llama"])), query_path=query)
    with pytest.raises(AttributionError, match="spectral basis belongs"):
        reduce_gradients(tmp_path / "x", ReduceConfig(), replace(asked, projection_dim=None, sketch_kind="spectral"))
    with pytest.raises(RunError, match="trace reduce or trace build makes queries"):
        scored(tmp_path, config, query_path=str(tmp_path / "nowhere"))
    build_index(tmp_path / "sketched", replace(asked, projection_dim=3))
    for side in (0, 7):
        with pytest.raises(RunError, match="the queries decide"):
            scored(tmp_path, replace(config, projection_dim=side), query_path=str(tmp_path / "sketched"))
    with pytest.raises(AttributionError, match="whole gradients"):
        scored(tmp_path, config, query_path=str(tmp_path / "sketched"), query_rank=2)
    with pytest.raises(AttributionError, match="method must be one of mean, sum"):
        ReduceConfig("median")
