"""Influence against the truth where the truth is cheap: a softmax regression, refitted without each row in turn.

A language model whose base stays as it is and whose output embedding alone is trained, with a penalty, is convex: its
Gauss-Newton matrix is its Hessian, and influence is the first order of what leaving a row out does to a query's loss
(Koh & Liang 2017, section 2.1).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf

from attribute import IndexConfig, LanguageModel
from attribute.batching import assemble
from attribute.curvature._gauss_newton import GaussNewton
from attribute.data import Row, TokenFileWriter
from attribute.engine import gradients_of
from attribute.methods.refined import conjugate_gradients

ROWS, QUERIES, VOCABULARY, WIDTH, PENALTY = 100, 20, 9, 6, 1.0


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """The model, and rows and queries of six tokens whose last one alone carries loss."""
    torch.manual_seed(0)
    config = hf.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=12,
        max_position_embeddings=8,
        initializer_range=0.8,
    )
    model = LanguageModel.wrap(hf.GPTNeoXForCausalLM(config).eval())
    generator = np.random.default_rng(0)
    sides = []
    for name, count in (("rows", ROWS), ("queries", QUERIES)):
        made = [Row(generator.integers(0, VOCABULARY, 6), np.arange(6) == 5, {}) for _ in range(count)]
        sides.append(TokenFileWriter(tmp_path_factory.mktemp(name), VOCABULARY).write(made))
    return model, *sides


def features(model, tokens):
    """Hidden states before the last token ``[n, width]``, and that token ``[n]``."""
    batch = assemble(tokens, range(len(tokens)), model.device)
    with torch.no_grad():
        hidden = model.base(input_ids=batch.input_ids, use_cache=False)[0][:, -2]
    return hidden.double(), batch.input_ids[:, -1]


def fitted(x, y, start):
    """The minimum of Σ losses + ½ penalty |W|², by Newton's method."""
    weight = start.clone()
    for _ in range(30):
        p = (x @ weight.T).softmax(-1)
        gradient = (p - torch.nn.functional.one_hot(y, VOCABULARY)).T @ x + PENALTY * weight
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = torch.einsum("nvw,ni,nj->viwj", middle, x, x).reshape(weight.numel(), -1)
        hessian += PENALTY * torch.eye(weight.numel(), dtype=torch.double)
        step = torch.linalg.solve(hessian, gradient.flatten()).view_as(weight)
        weight = weight - step
        if step.abs().max() < 1e-12:
            return weight
    raise AssertionError("Newton's method did not converge")


def test_influence_is_what_leaving_a_row_out_does(regression):
    model, rows, queries = regression
    (x, y), (xq, yq) = features(model, rows), features(model, queries)
    optimum = fitted(x, y, torch.zeros(VOCABULARY, WIDTH, dtype=torch.double))

    def losses(weight):
        return torch.nn.functional.cross_entropy(xq @ weight.T, yq, reduction="none")

    kept = ~torch.eye(ROWS, dtype=torch.bool)
    truth = torch.stack([losses(fitted(x[k], y[k], optimum)) - losses(optimum) for k in kept], dim=1)

    (head,) = model.outside.values()
    with torch.no_grad():
        head.weight.copy_(optimum)
    plan = model.plan(IndexConfig(projection_dim=0, modules=tuple(model.outside)))
    matrix = GaussNewton(model, plan, [assemble(rows, range(ROWS), model.device)])
    right = torch.from_numpy(gradients_of(model, queries, plan))

    def multiply(each):
        return ROWS * matrix.multiply(each) + PENALTY * each

    solved = conjugate_gradients(multiply, lambda each: each, right, torch.zeros_like(right), 120)
    influence = solved.numpy() @ gradients_of(model, rows, plan).T

    found, expected = influence.ravel(), truth.numpy().ravel()
    assert np.corrcoef(found, expected)[0, 1] >= 0.995
    # A row counts for more the better it fits itself: leaving it out does 1 / (1 − leverage) of what influence says.
    assert np.abs(found - expected).max() <= 0.25 * np.abs(expected).max()
    plain = (right.numpy() @ gradients_of(model, rows, plan).T).ravel()
    assert np.corrcoef(plain, expected)[0, 1] < 0.99
