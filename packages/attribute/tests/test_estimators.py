"""Every method over a study equals its formula written out over whole gradients."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribute import AttributionError, IndexConfig, LanguageModel
from attribute.data import Row, TokenFile, TokenFileWriter
from attribute.engine import gradients_of
from attribute.methods import Checkpoint, Study, estimator_named, estimators
from gradcore import TwoSided

FLAT = ("loss", "length", "self-influence")  # the same for every query


def close(found: np.ndarray, expected: np.ndarray, relative: float = 2e-4) -> None:
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def token_file(folder: Path, rows: int, start: int) -> TokenFile:
    """Rows of 3 to 15 tokens."""
    made = []
    for number in range(start, start + rows):
        length = 3 + (number * 5) % 13
        made.append(Row(np.arange(length) * (number + 3) % 90 + 2, np.ones(length, dtype=bool), {}))
    return TokenFileWriter(folder, 300).write(made)


@pytest.fixture(scope="module")
def study(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    model, other = (LanguageModel.wrap(make_model("gpt2", seed).eval()) for seed in (0, 1))
    rows, queries = token_file(root / "rows", 6, 0), token_file(root / "queries", 3, 4)
    plan = model.plan(IndexConfig(projection_dim=0, modules=("*",), include_bias=True))
    return Study(
        model,
        rows,
        queries,
        plan,
        [f"row {number} of the sea" for number in range(6)],
        [f"query of row {number}" for number in range(3)],
        checkpoints=(Checkpoint(other, 0.5), Checkpoint(model, 0.25)),
        projection_dim=3,
        solver_rows=2,
        solver_steps=2,
        horizon=0.5,
        batch=2,
    )


@pytest.fixture(scope="module")
def gradients(study: Study) -> tuple[np.ndarray, np.ndarray]:
    return tuple(gradients_of(study.model, side, study.plan).astype(np.float64) for side in (study.rows, study.queries))  # type: ignore[return-value]


@pytest.mark.parametrize("name", estimators())
def test_every_method_says_what_it_is_and_scores_every_pair(study, name):
    method = estimator_named(name)
    assert method.name == name
    assert method.needs
    assert method.cost
    assert method.source
    scores = method.influence(study)
    assert scores.shape == (3, 6)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    spread = scores.std(axis=1)
    assert (spread > 0).all()
    if name in FLAT:
        assert (scores == scores[0]).all()


def test_products_and_cosines(study, gradients):
    rows, queries = gradients
    close(estimator_named("grad-dot").influence(study), queries @ rows.T)
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
    close(estimator_named("grad-cos").influence(study), queries @ rows.T / norms)


def test_tracin_sums_over_checkpoints(study, gradients):
    rows, queries = gradients
    other = study.checkpoints[0].model
    plan = other.plan(IndexConfig(projection_dim=0, modules=("*",), include_bias=True))
    sides = [gradients_of(other, side, plan).astype(np.float64) for side in (study.queries, study.rows)]
    close(estimator_named("tracin").influence(study), 0.25 * queries @ rows.T + 0.5 * sides[0] @ sides[1].T)


def test_less_is_a_sum_of_cosines_with_adam_steps(study):
    """With a sketch that keeps everything: cosines of g_q and g_i / √v, v the mean squared gradient of the rows."""
    matrix = replace(study, projection_dim=64, plan=study.plan.restrict(["h.1.mlp.c_fc"]))
    found = estimator_named("less").influence(matrix)
    whole = np.zeros((3, 6))
    for checkpoint in study.checkpoints:
        plan = replace(matrix.plan, model="")
        queries, rows = (gradients_of(checkpoint.model, side, plan) for side in (study.queries, study.rows))
        rows = rows / (np.sqrt((rows**2).mean(0)) + 1e-8)
        norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1)
        whole += checkpoint.learning_rate * (queries @ rows.T / norms)
    assert np.corrcoef(found.ravel(), whole.ravel())[0, 1] > 0.9  # 4,096 random floats of 1,088


def test_datainf_is_the_mean_of_dense_inverses(study, gradients):
    """On the modules that are small enough for (g gᵀ + λ)⁻¹ to be written out."""
    plan = study.plan.restrict(["h.0.ln_1", "h.1.attn.c_proj"])
    small = Study(study.model, study.rows, study.queries, plan)
    expected = np.zeros((3, 6))
    for name, columns in plan.slices.items():
        rows, queries = (side[:, study.plan.slices[name]] for side in gradients)
        width = columns.stop - columns.start
        floor = 0.1 * (rows**2).sum() / len(rows) / width
        inverse = sum(np.linalg.inv(np.outer(g, g) + floor * np.eye(width)) for g in rows) / len(rows)
        expected += queries @ inverse @ rows.T
    close(estimator_named("datainf").influence(small), expected)
    with pytest.raises(AttributionError, match="must be positive"):
        estimator_named("datainf").influence(replace(small, damping=0.0))


def test_preconditioned_is_a_damped_inverse_of_the_second_moment(study):
    rows, queries = (side.astype(np.float64) for side in study.sketches)
    expected = np.zeros((3, 6))
    for columns in study.sketched.slices.values():
        moment = rows[:, columns].T @ rows[:, columns] / len(rows)
        damped = moment + 0.1 * np.trace(moment) / len(moment) * np.eye(len(moment))
        expected += queries[:, columns] @ np.linalg.solve(damped, rows[:, columns].T)
    close(estimator_named("preconditioned-if").influence(study), expected)


def test_trak_is_its_formula_over_autograd_log_odds(study):
    """Two models, each with a sketch of its own; both factors averaged apart."""
    product, doubt = np.zeros((3, 6)), np.zeros(6)
    for number, checkpoint in enumerate(study.checkpoints):
        plan = replace(study.sketched, sketch=TwoSided(3, seed=number), model="")
        sides, probabilities = [], []
        for tokens in (study.rows, study.queries):
            found = []
            for row in range(len(tokens)):
                ids = torch.from_numpy(tokens.ids(row).astype(np.int64))[None]
                with checkpoint.model.collector(plan) as collector:
                    log_p = checkpoint.model.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
                    p = log_p.gather(2, ids[:, 1:, None]).exp()
                    (p / (1 - p)).log().sum().backward()
                    found.append(collector.take()[0].double().numpy().copy())
                if tokens is study.rows:
                    probabilities.append(p.mean().item())
            sides.append(np.stack(found))
        for columns in plan.slices.values():
            rows, queries = sides[0][:, columns], sides[1][:, columns]
            moment = rows.T @ rows / 6
            damped = moment + 0.1 * np.trace(moment) / len(moment) * np.eye(len(moment))
            product += queries @ np.linalg.solve(damped, rows.T) / 2
        doubt += (1 - np.array(probabilities)) / 2
    close(estimator_named("trak").influence(study), product * doubt, 1e-3)


@pytest.fixture(scope="module")
def dense(study):
    """A study of a few modules of every kind, with their Gauss-Newton matrix written out from autograd's Jacobian."""
    plan = study.plan.restrict(["h.0.ln_1", "h.1.attn.c_proj"])
    small = Study(study.model, study.rows, study.queries, plan, solver_rows=2, damping=1.0)
    names = [f"{each.name}.{kind}" for each in plan.modules for kind in ("weight", "bias")]
    base, model = study.model.base, study.model.model
    total = torch.zeros(plan.width, plan.width, dtype=torch.float64)
    for row in (0, 5):  # the two that solver_rows=2 takes
        ids = torch.from_numpy(study.rows.ids(row).astype(np.int64))[None]

        def logits(*values: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
            parameters = {f"transformer.{name}": value for name, value in zip(names, values)}
            return torch.func.functional_call(model, parameters, kwargs={"input_ids": ids}).logits[0, :-1]

        values = tuple(base.get_parameter(name).detach() for name in names)
        # The kernel that forward mode knows; few parameters, many logits. torch warns about its own derivatives.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = torch.func.jacfwd(logits, argnums=tuple(range(len(values))))(*values)
        found = []
        for each, weight, bias in zip(plan.modules, parts[::2], parts[1::2]):
            weight = weight.mT if each.kind == "hf_conv1d" else weight[..., None]
            found.append(torch.cat((weight, bias[..., None]), dim=-1).flatten(2))
        jacobian = torch.cat(found, dim=2).double()  # [s, v, width]
        p = logits(*values).double().softmax(-1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        total += torch.einsum("svi,svw,swj->ij", jacobian, middle, jacobian).detach()
    return small, total / 2


def test_gauss_newton_products_are_those_of_the_dense_matrix(dense):
    from attribute.methods.refined import damped_product

    study, matrix = dense
    multiply, diagonal = damped_product(study)
    x = torch.randn(2, study.plan.width, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ matrix + diagonal * x
    close(multiply(x).double().numpy(), expected.numpy())


def test_solvers_reach_the_dense_solution(dense, study):
    from attribute.methods.refined import conjugate_gradients, damped_product, neumann

    small, matrix = dense
    _, diagonal = damped_product(small)
    full = (matrix + torch.diag(diagonal.double())).float()
    right = torch.from_numpy(small.query_gradients)
    expected = torch.linalg.solve(full.double(), right.double().T).T.numpy()
    found = conjugate_gradients(lambda x: x @ full, lambda x: x / full.diag(), right, right / full.diag(), 200)
    close(found.numpy(), expected, 1e-3)
    condition = torch.linalg.cond(full).item()
    series = neumann(lambda x: x @ full, right, int(12 * condition))
    close(series.numpy(), expected, 1e-3)


def test_cg_scores_are_those_of_the_dense_inverse(dense):
    small, matrix = dense
    from attribute.methods.refined import damped_product

    _, diagonal = damped_product(small)
    queries, rows = (
        torch.from_numpy(gradients_of(small.model, s, small.plan)).double() for s in (small.queries, small.rows)
    )
    expected = queries @ torch.linalg.solve(matrix + torch.diag(diagonal.double()), rows.T)
    close(estimator_named("ek-fac-cg").influence(replace(small, solver_steps=40)), expected.numpy(), 1e-2)


def test_adam_cg_scores_are_those_of_the_dense_inverse(dense):
    """Damped by √v / T, with the optimiser's own moments and with those that its batches must have had."""
    small, matrix = dense
    queries, rows = (gradients_of(small.model, s, small.plan).astype(np.float64) for s in (small.queries, small.rows))
    moments = {each.path: torch.rand(each.out_features, each.in_features) for each in small.plan.modules}
    given = np.concatenate([moments[name].flatten().numpy() for name in small.plan.slices])
    tokens = np.mean([len(small.rows.ids(row)) - 1 for row in range(len(small.rows))])
    worked_out = rows.mean(0) ** 2 + rows.var(0) / 4
    small = replace(small, solver_steps=60, horizon=0.5)
    for study, root in [
        (replace(small, moments=moments), tokens * (np.sqrt(given) + 1e-8)),
        (replace(small, batch=4), np.sqrt(worked_out) + tokens * 1e-8),
    ]:
        expected = queries @ np.linalg.solve(matrix.numpy() + np.diag(root / 0.5), rows.T)
        close(estimator_named("adam-cg").influence(study), expected, 1e-2)
    for study, reason in [(small, "--train-batch-size"), (replace(small, batch=4, horizon=0.0), "--horizon")]:
        with pytest.raises(AttributionError, match=reason):
            estimator_named("adam-cg").influence(study)


@pytest.mark.parametrize("side", [6, 300])
def test_sketched_ekfac_is_ekfac_in_its_leading_coordinates(study, side):
    """With room for all of them it is EK-FAC itself."""
    rotated = [gradients_of(study.model, s, study.plan) for s in (study.queries, study.rows)]
    curvature, columns = study.curvature("ekfac"), study.plan.slices
    for gradients in rotated:
        for name, module in curvature.modules.items():
            block = torch.from_numpy(gradients[:, columns[name]]).unflatten(1, study.plan.shapes[name])
            gradients[:, columns[name]] = module.rotate(block).flatten(1).numpy()
    every = {name: module.eigenvalues.flatten().double().numpy() for name, module in curvature.modules.items()}
    damped = np.concatenate([1 / (each + study.damping * each.mean()) for each in every.values()])
    spectrum = np.concatenate(list(every.values()))
    kept = np.argsort(-spectrum, kind="stable")[: side**2 * len(columns)]
    kept = np.union1d(
        kept, [columns[name].start + place for name, each in every.items() for place in each.argsort()[-2:]]
    )
    expected = (rotated[0][:, kept] * damped[kept]) @ rotated[1][:, kept].T
    found = estimator_named("ek-fac-sketched").influence(replace(study, projection_dim=side))
    close(found, expected, 1e-3)
    if len(kept) == len(spectrum):
        close(found, estimator_named("ek-fac").influence(study), 1e-3)
    assert (len(kept) == len(spectrum)) is (side == 300)


def test_self_influence_is_the_diagonal_of_ekfac(study):
    """A row asked about itself."""
    itself = Study(study.model, study.rows, study.rows, study.plan)
    diagonal = np.diag(estimator_named("ek-fac").influence(itself))
    close(estimator_named("self-influence").influence(study)[0], diagonal)
    assert (diagonal > 0).all()


def test_the_sign_is_that_of_a_training_step(study):
    """A small step of training on the best row lowers the query's loss, one on the worst raises it."""
    from copy import deepcopy

    plan = study.plan.restrict("h.1.mlp.c_proj")
    small = Study(study.model, study.rows, study.queries, plan)
    scores = estimator_named("grad-dot").influence(small)
    rows = gradients_of(study.model, study.rows, plan)
    assert (scores.max(1) > 0).all()
    assert (scores.min(1) < 0).any()
    for query in range(3):
        for row in (scores[query].argmax(), scores[query].argmin()):
            moved = LanguageModel.wrap(deepcopy(study.model.model))
            step = 1e-3 * torch.from_numpy(rows[row]).reshape(plan.modules[0].out_features, -1)
            layer = moved.base.get_submodule("h.1.mlp.c_proj")
            with torch.no_grad():
                layer.weight -= step[:, :-1].T
                layer.bias -= step[:, -1]
            losses = [Study(m, study.queries, study.queries, plan).losses()[query] for m in (study.model, moved)]
            assert losses[0] - losses[1] == pytest.approx(1e-3 * scores[query, row], rel=0.3, abs=1e-4)


def test_refusals(study):
    bare = Study(study.model, study.rows, study.queries, study.plan)
    with pytest.raises(AttributionError, match="checkpoints with their learning rates"):
        estimator_named("tracin").influence(bare)
    with pytest.raises(AttributionError, match="texts of all rows"):
        estimator_named("bm25").influence(bare)
    with pytest.raises(AttributionError, match="did you mean ek-fac"):
        estimator_named("ekfac")
    with pytest.raises(AttributionError, match="whole gradients"):
        Study(study.model, study.rows, study.queries, study.model.plan(IndexConfig(projection_dim=4)))


def test_hidden_states_are_means_over_real_tokens(study):
    found = study.hidden(study.rows)
    for row in range(len(study.rows)):
        with torch.no_grad():
            ids = torch.from_numpy(study.rows.ids(row).astype(np.int64))[None]
            expected = study.model.base(input_ids=ids)[0][0].mean(0).numpy()
        close(found[row], expected, 1e-5)
