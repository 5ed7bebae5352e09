"""Losses other than plain cross-entropy against logits written out, values and gradients, and memory's shape."""

from __future__ import annotations

import pytest
import torch
from gradcore_reference import relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradcore import CapturePlan, GradCoreError, GradientCollector, Loss, not_collecting, per_example_loss
from gradcore import _losses as losses_module

LABELS = torch.tensor([[0, 1, 2, 3], [4, -100, 6, -100], [1, 1, 1, 1]])


def setting(bias: bool, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 4, 8, generator=draw).mul_(scale).requires_grad_()
    return hidden, torch.randn(40, 8, generator=draw), torch.randn(40, generator=draw) if bias else None


def by_logits(loss: Loss, hidden: Tensor, weight: Tensor, bias: Tensor | None, reference: Tensor | None) -> Tensor:
    def logits_of(states: Tensor) -> Tensor:
        return nn.functional.linear(states[:, :-1].double(), weight.double(), None if bias is None else bias.double())

    logits = logits_of(hidden)
    targets, counted = LABELS[:, 1:], LABELS[:, 1:] != -100
    if loss.name == "kl":
        other = logits_of(reference)
        p = logits.log_softmax(-1)
        return ((p.exp() * (p - other.log_softmax(-1))).sum(-1) * counted).sum(1)
    if loss.name == "log_odds":
        p = logits.softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return (-(p / (1 - p)).log() * counted).sum(1)
    found = cross_entropy(logits.mT, targets, reduction="none", label_smoothing=loss.smoothing)
    return found.sum(1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", [Loss(), Loss("ce", 0.1), Loss("log_odds"), Loss("kl")])
@pytest.mark.parametrize("chunk", [1, 25_000_000])
def test_values_and_gradients_are_those_of_the_logits(loss, bias, chunk, monkeypatch):
    monkeypatch.setattr(losses_module, "CHUNK_FLOATS", chunk)
    hidden, weight, offset = setting(bias)
    reference = hidden.detach() + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    found = per_example_loss(hidden, weight, LABELS, bias=offset, loss=str(loss), reference=(reference, weight, offset))
    expected = by_logits(loss, hidden, weight, offset, reference)
    assert relative(found.detach(), expected.detach()) < 1e-5
    (gradient,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
    (truth,) = torch.autograd.grad(expected.sum(), hidden)
    assert relative(gradient, truth) < 1e-5


def test_log_odds_stay_finite_where_the_model_is_sure():
    """Cross-entropy's gradient is 0 in float32 there; that of the log odds is not, and not infinite."""
    weight = torch.eye(5) * 100
    hidden = torch.eye(5)[:1].repeat(1, 2, 1).view(1, 2, 5).requires_grad_()
    for loss in ("ce", "log_odds"):
        found = per_example_loss(hidden, weight, torch.tensor([[0, 0]]), loss=loss)
        (gradient,) = torch.autograd.grad(found.sum(), hidden)
        assert found.isfinite().all()
        assert gradient.isfinite().all()


def test_a_loss_is_named_and_read_back():
    for loss in (Loss(), Loss("ce", 0.25), Loss("kl"), Loss("log_odds")):
        assert Loss.named(str(loss)) == loss
    for bad in ("hinge", "ce(smoothing=x)"):
        with pytest.raises(GradCoreError, match="a loss is one of"):
            Loss.named(bad)
    for name, smoothing in (("ce", 1.0), ("kl", 0.1)):
        with pytest.raises(GradCoreError, match="smoothing"):
            Loss(name, smoothing)
    hidden, weight, _ = setting(False)
    with pytest.raises(GradCoreError, match="compares with a reference"):
        per_example_loss(hidden, weight, LABELS, loss="kl")


def test_collectors_let_a_reference_pass():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    with GradientCollector(model, CapturePlan.for_model(model)) as plain:
        model(x).square().sum().backward()
    with GradientCollector(model, CapturePlan.for_model(model)) as collector:
        with torch.no_grad(), not_collecting():
            model(torch.randn(2, 4))
        model(x).square().sum().backward()
    torch.testing.assert_close(collector.rows, plain.rows)
