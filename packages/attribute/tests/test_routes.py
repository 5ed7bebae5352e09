"""The planner of scores: routes that give the same numbers, estimates that are counted, and the cheapest one taken."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attribute import DataConfig, IndexConfig, build_index
from attribute.batching import assemble
from attribute.engine import evaluating
from attribute.model import load_model
from attribute.scoring import ScoreConfig, _score, score_dataset
from attribute.scoring._measure import measuring
from attribute.scoring._queries import Queries
from attribute.scoring._routes import Plan, Route, plan_routes
from gradcore._product_costs import MOVED

KINDS = ("contracted", "formed", "forward")
ROWS, TOKENS = 6, 24


@pytest.fixture(scope="module")
def world(folders, tmp_path_factory):
    """Rows and queries of equally many tokens, so that there is no padding to count."""
    root = tmp_path_factory.mktemp("routes")
    draw = np.random.default_rng(0)
    for name, count in (("train", ROWS), ("query", 5)):
        lines = [json.dumps({"input_ids": draw.integers(2, 300, TOKENS).tolist(), "text": "x"}) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    config = IndexConfig(
        model=str(folders["llama"]), device="cpu", projection_dim=0, data=DataConfig(dataset=str(root / "train.jsonl"))
    )
    build_index(root / "query", replace(config, data=DataConfig(dataset=str(root / "query.jsonl"))))
    return root, replace(config, projection_dim=None)


def planned(root, **options: Any) -> tuple[Any, Queries, Plan]:
    queries, model = Queries(ScoreConfig(str(root / "query"), **options)), load_model_of(root)
    return model, queries, plan_routes(queries, model, TOKENS)


def load_model_of(root):
    from gradstore import GradientStore

    return load_model(GradientStore.open(root / "query").meta["config"]["model"], device="cpu")


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, KINDS),
        ({"score": "mean"}, KINDS),
        ({"score": "nearest"}, KINDS),
        ({"unit_normalize": True}, KINDS[:2]),
        ({"tokens": "gradient"}, KINDS[:2]),
    ],
)
def test_every_route_gives_the_same_scores(world, tmp_path, monkeypatch, options, kinds):
    root, config = world
    _, _, plan = planned(root, **options)
    assert {each.kind for each in plan.routes} == set(kinds)
    found = {}
    kinds = (*kinds, "mixed")
    for kind in kinds:
        route = Route(kind, 0.0, "")
        monkeypatch.setattr(_score, "plan_routes", lambda *_, route=route: Plan((route,), TOKENS))
        done = score_dataset(tmp_path / kind, ScoreConfig(str(root / "query"), **options), config)
        found[kind] = done.scores.block(0, done.scores.store.rows)
    for kind in kinds[1:]:
        np.testing.assert_allclose(
            found[kind], found["contracted"], rtol=2e-3, atol=2e-4 * np.abs(found["formed"]).max()
        )


def test_modules_may_take_routes_of_their_own(world):
    """Norms of narrow modules are cheaper of formed gradients, those of wide ones of inner products of positions."""
    root, _ = world
    model, queries, _ = planned(root, score="mean", unit_normalize=True)
    plans = [plan_routes(queries, model, positions) for positions in range(1, 40)]
    mixed = [each for each in plans if each.route.kind == "mixed"]
    assert mixed
    assert {each.route.kind for each in plans} == {"contracted", "mixed", "formed"}
    assert all(each.route.cost < min(other.cost for other in each.routes[1:]) for each in mixed)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"score": "mean"}, "contracted"),
        ({}, "formed"),
        ({"tokens": "gradient"}, "contracted"),
        ({"tokens": "output"}, "forward"),
        ({"query_rank": 1}, "ghost"),
    ],
)
def test_the_cheapest_route_is_taken_and_said(world, tmp_path, options, taken):
    root, config = world
    _, _, plan = planned(root, **options)
    assert plan.route.kind == taken
    assert plan.route.cost == min(each.cost for each in plan.routes)
    done = score_dataset(tmp_path / "scores", ScoreConfig(str(root / "query"), **options), config)
    assert done.route == str(plan)
    assert f"multiplications a row of {TOKENS} tokens" in done.route
    assert all(f"{each.kind}: " in done.route for each in plan.routes[1:])


def counted(model, queries: Queries, route: Route, tokens) -> float:
    """Multiplications a row, as torch counts them; attention is left out, as in the estimate."""
    batch = assemble(tokens, np.arange(ROWS), torch.device("cpu"))
    model = replace(model, fused=False)  # whose loss multiplies into buffers, which torch does not count
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.enable_grad(), measuring(model, queries, route) as measure, counter:
        measure(batch)
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operation, flops in counts.items() if "attention" not in str(operation)) / 2 / ROWS


@pytest.mark.parametrize("kind", ["contracted", "formed"])
@pytest.mark.parametrize("score", ["mean", "individual"])
def test_the_estimate_is_what_torch_counts(world, tmp_path, kind, score):
    from attribute.data import TokenFile, TokenFileWriter, open_source, rows_of

    root, config = world
    model, queries, plan = planned(root, score=score)
    rows = rows_of(open_source(config.data), None, config.data, None)
    tokens: TokenFile = TokenFileWriter(tmp_path / "tokens", model.vocabulary).write(rows)
    route = next(each for each in plan.routes if each.kind == kind)
    moved = MOVED * sum(each.out_features * each.in_features for each in queries.plan.modules) * (kind == "formed")
    assert counted(model, queries, route, tokens) == pytest.approx(route.cost - moved, rel=0.05)
