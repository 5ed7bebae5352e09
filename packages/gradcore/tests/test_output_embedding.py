"""The output embedding, tied and not, through the fused loss and through its own module."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gradcore_models import TinyLM
from gradcore_reference import relative
from torch import nn

from gradcore import (
    CaptureError,
    CapturePlan,
    GradientCollector,
    ModuleGradient,
    Normalizer,
    Spectral,
    TensorSketch,
    TwoSided,
    coverage,
    fit_spectral,
    not_collecting,
    per_example_loss,
)
from gradcore import _output_loss as output_loss_module

IDS = torch.randint(0, 23, (5, 7), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[1, 4:] = -100
LABELS[2, :] = -100
LABELS[3, :5] = -100
LOSSES = ["ce", "ce(smoothing=0.1)", "log_odds", "kl"]


def language_model(tied: bool, bias: bool = False) -> TinyLM:
    torch.manual_seed(0)
    model = TinyLM()
    if bias:
        model.head = nn.Linear(8, 23)
    if tied:
        model.head.weight = model.embed.weight
    return model


def fused(model: TinyLM, loss: str = "ce", ids=IDS, labels=LABELS):
    reference = (torch.randn(*ids.shape, 8, generator=torch.Generator().manual_seed(2)), torch.ones(23, 8), None)
    return per_example_loss(
        model.hidden(ids),
        model.head.weight,
        labels,
        bias=model.head.bias,
        loss=loss,
        reference=reference if loss == "kl" else None,
    )


def plain(model: TinyLM, row: int, loss: str):
    """One row's loss out of its logits, written out."""
    logits = model.head(model.hidden(IDS[row : row + 1]))[0, :-1]
    targets = LABELS[row, 1:]
    log_p = logits.log_softmax(1)[targets != -100]
    picked = log_p.gather(1, targets[targets != -100][:, None])[:, 0]
    if loss == "ce":
        return -picked.sum()
    if loss == "log_odds":
        return -(picked - torch.log1p(-picked.exp())).sum()
    if loss == "kl":
        other = torch.randn(*IDS.shape, 8, generator=torch.Generator().manual_seed(2))[row, :-1] @ torch.ones(8, 23)
        return (log_p.exp() * (log_p - other.log_softmax(1)[targets != -100])).sum()
    return -(0.9 * picked + 0.1 * log_p.mean(1)).sum()


def truth(model: TinyLM, plan: CapturePlan, loss: str = "ce") -> dict[str, torch.Tensor]:
    rows: dict[str, list[torch.Tensor]] = {each.name: [] for each in plan.modules}
    for row in range(len(IDS)):
        model.zero_grad()
        plain(model, row, loss).backward()
        for each in plan.modules:
            module = model.get_submodule(each.path)
            gradient = module.weight.grad.clone()
            gradient = gradient.T if type(module).__name__ == "Conv1D" else gradient.reshape(each.out_features, -1)
            if each.bias:
                gradient = torch.cat([gradient, module.bias.grad[:, None]], 1)
            rows[each.name].append(gradient)
    model.zero_grad()
    return {name: torch.stack(each) for name, each in rows.items()}


def assert_rows(collector: GradientCollector, expected: dict[str, torch.Tensor]) -> None:
    for name, rows in expected.items():
        assert relative(collector.gradients[name], rows) < 1e-5, name


@pytest.mark.parametrize("chunk", [1, 25_000_000], ids=["a row a block", "one block"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_the_fused_loss_gives_the_gradient_of_the_output_embedding(tied, loss, chunk, monkeypatch):
    monkeypatch.setattr(output_loss_module, "CHUNK_FLOATS", chunk)
    model = language_model(tied, bias=not tied)
    plan = CapturePlan.for_model(model, include_bias=True)
    assert ("head" in plan.columns) is not tied
    assert [each.tied for each in plan.modules if each.tied] == ([("head",)] if tied else [])
    expected = truth(model, plan, loss)
    with GradientCollector(model, plan) as collector:
        fused(model, loss).sum().backward()
    assert_rows(collector, expected)
    assert not collector.rows[2].any(), "a row without labels"


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_the_modules_own_forward_pass_gives_the_same(tied):
    model = language_model(tied)
    plan = CapturePlan.for_model(model)
    expected = truth(model, plan)
    with GradientCollector(model, plan) as collector:
        logits = model.head(model.hidden(IDS))[:, :-1].mT
        nn.functional.cross_entropy(logits, LABELS[:, 1:], reduction="sum").backward()
    assert_rows(collector, expected)


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_one_batch_equals_rows_one_by_one_and_in_blocks(tied, monkeypatch):
    model = language_model(tied)
    plan = CapturePlan.for_model(model, sketch=TensorSketch(32))
    with GradientCollector(model, plan) as collector:
        fused(model).sum().backward()
        together = collector.take().clone()
        monkeypatch.setattr(output_loss_module, "CHUNK_FLOATS", 1)
        fused(model).sum().backward()
        torch.testing.assert_close(collector.take(), together)
        for row in range(len(IDS)):
            fused(model, ids=IDS[row : row + 1], labels=LABELS[row : row + 1]).sum().backward()
            torch.testing.assert_close(collector.take()[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sketch", [TwoSided(4), TensorSketch(32)], ids=["two-sided", "tensor"])
def test_sketches_are_those_of_the_gradient_of_both_uses(sketch):
    model = language_model(tied=True)
    plan = CapturePlan.for_model(model, sketch=sketch)
    expected = truth(model, plan)
    with GradientCollector(model, plan) as collector:
        fused(model).sum().backward()
    for each in plan.modules:
        bound = sketch.bind(each.name, each.out_features, each.in_features, torch.device("cpu"), each.elementwise)
        whole = expected[each.name]
        rows = bound.vector(whole) if each.elementwise else bound.matrix(whole)
        torch.testing.assert_close(collector.gradients[each.name], rows, rtol=1e-4, atol=1e-5)


def test_a_spectral_basis_is_fitted_to_the_output_side_and_a_shared_table_is_sketched():
    def run(model):
        return lambda: fused(model).sum().backward()

    model = language_model(tied=False)
    plan = fit_spectral(model, CapturePlan.for_model(model), run(model), floats=8 * 23)
    assert isinstance(plan.sketch, Spectral)
    assert plan.sketch.basis is not None
    assert "head" in plan.sketch.basis.modules
    expected = truth(model, plan)["head"]
    with GradientCollector(model, plan) as collector:
        fused(model).sum().backward()
    # Every coordinate is kept: a rotation.
    kept = collector.gradients["head"]
    torch.testing.assert_close(kept @ kept.T, expected.flatten(1) @ expected.flatten(1).T, rtol=1e-4, atol=1e-4)

    model = language_model(tied=True)
    plan = fit_spectral(model, CapturePlan.for_model(model), run(model), floats=9)
    assert isinstance(plan.sketch, Spectral)
    assert plan.sketch.basis is not None
    assert "embed" not in plan.sketch.basis.modules
    assert plan.columns["embed"] == 9


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_a_row_a_position_sums_to_the_rows(tied, monkeypatch):
    model = language_model(tied)
    plan = CapturePlan.for_model(model)
    expected = truth(model, plan)
    monkeypatch.setattr(output_loss_module, "CHUNK_FLOATS", 1)
    with GradientCollector(model, plan, per_position=True) as collector:
        fused(model).sum().backward()
    for name, rows in expected.items():
        found = collector.gradients[name].unflatten(0, IDS.shape).sum(1)
        torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
@pytest.mark.parametrize("kind", ["adam", "adafactor"])
def test_normalised(kind, tied):
    model = language_model(tied)
    plan = CapturePlan.for_model(model)
    expected = truth(model, plan)
    moments = {name: rows.square().mean(0) + 0.1 for name, rows in expected.items()}
    scaled = replace(plan, normalizer=Normalizer.of_moments(kind, moments))
    with GradientCollector(model, scaled) as collector:
        fused(model).sum().backward()
    name = "embed" if tied else "head"
    scale = collector.gradients[name] / expected[name]
    some = expected[name].abs() > 1e-4
    for row in range(len(IDS)):
        torch.testing.assert_close(scale[row][some[row]], scale[0][some[row]], rtol=1e-3, atol=1e-3)
    if kind == "adam":
        torch.testing.assert_close(
            scale[0][some[0]], (moments[name].sqrt() + 1e-8).reciprocal()[some[0]], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_factors_of_both_uses_are_the_gradient(tied):
    model = language_model(tied)
    plan = CapturePlan.for_model(model)
    expected = truth(model, plan)
    held: dict[str, list[ModuleGradient]] = {}
    with GradientCollector(model, plan, factors=lambda each: held.setdefault(each.name, []).append(each)):
        fused(model).sum().backward()
    assert len(held["embed"]) == (2 if tied else 1)
    for name, parts in held.items():
        whole = ModuleGradient.joined(parts)
        torch.testing.assert_close(whole.dense(), expected[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole.sq_norm(), expected[name].square().sum((1, 2)), rtol=1e-4, atol=1e-6)


def test_means_and_weights_of_rows_reach_it():
    model = language_model(tied=False)
    plan = CapturePlan.for_model(model, "head")
    expected = truth(model, plan)["head"]
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0])
    counts = (LABELS[:, 1:] != -100).sum(1).clamp(min=1)
    with GradientCollector(model, plan) as collector:
        loss = per_example_loss(model.hidden(IDS), model.head.weight, LABELS, reduction="mean")
        (loss * weights).sum().backward()
    torch.testing.assert_close(
        collector.gradients["head"], expected * (weights / counts)[:, None, None], rtol=1e-5, atol=1e-6
    )


def test_the_output_embedding_alone_needs_no_graph_before_it():
    model = language_model(tied=False)
    plan = CapturePlan.for_model(model, "head")
    expected = truth(model, plan)
    with GradientCollector(model, plan) as collector:
        fused(model).sum().backward()
    assert_rows(collector, expected)


def test_a_head_beside_its_base():
    model = language_model(tied=True)
    base = nn.ModuleDict({"embed": model.embed, "blocks": model.blocks})
    outside = {"lm_head": model.head}
    plan = CapturePlan.for_model(base, outside=outside)
    assert plan.modules[0].tied == ("lm_head",)
    assert coverage(base, CapturePlan.for_model(base, include_bias=True, outside=outside), outside).share == 1
    expected = truth(model, CapturePlan.for_model(model))
    with GradientCollector(base, plan, outside=outside) as collector:
        fused(model).sum().backward()
    assert_rows(collector, expected)
    with pytest.raises(CaptureError, match="lm_head"):
        GradientCollector(base, plan).__enter__()


def test_who_excludes_the_head_gets_the_lookup_alone():
    model = language_model(tied=True)
    plan = CapturePlan.for_model(model, exclude="head")
    assert plan.modules[0].tied == ()
    expected = truth(language_model(tied=True), CapturePlan.for_model(model))["embed"]
    with GradientCollector(model, plan) as collector:
        fused(model).sum().backward()
    unused = torch.ones(23, dtype=torch.bool)
    unused[IDS.unique()] = False
    assert not collector.gradients["embed"][:, unused].any()
    assert expected[:, unused].any()


def test_a_closed_collector_and_one_that_is_paused_see_no_loss():
    model = language_model(tied=False)
    plan = CapturePlan.for_model(model, "head")
    with GradientCollector(model, plan) as collector:
        with not_collecting():
            fused(model)
        collector.enabled = False
        fused(model)
        collector.enabled = True
        fused(model).sum().backward()
        assert len(collector.take()) == len(IDS)
    fused(model).sum().backward()
    assert model.head.weight.grad is None, "the fused loss gives weights no gradient"
    assert not collector._passes


def test_plans_remember_what_is_tied():
    plan = CapturePlan.for_model(language_model(tied=True))
    assert CapturePlan.from_dict(plan.to_dict()) == plan
    assert "tied" not in CapturePlan.for_model(language_model(tied=False)).to_dict()["modules"][0]
