"""The fused head is plain cross-entropy, in value and gradient, on every path."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gradcore import CaptureError, per_example_loss
from gradcore import _vocabulary as vocabulary


def plain(hidden, weight, labels, bias=None, reduction="sum"):
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    losses = functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none", ignore_index=-100)
    if reduction == "sum":
        return losses.sum(1)
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)


@pytest.fixture(params=["flash", "chunks", "small chunks"])
def path(request, monkeypatch):
    """Each way to reduce over the vocabulary."""
    if request.param != "flash":
        monkeypatch.setattr(vocabulary, "_FLASH", None)
    if request.param == "small chunks":
        monkeypatch.setattr(vocabulary, "_CHUNK_FLOATS", 1)
    return request.param


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_equals_plain_cross_entropy(path, reduction, with_bias, scale):
    hidden = torch.randn(3, 9, 8, requires_grad=True)
    weight, bias = torch.randn(701, 8) * scale, torch.randn(701) if with_bias else None
    labels = torch.randint(0, 701, (3, 9))
    labels[0, 4:] = -100
    labels[1, :6] = -100
    factors = torch.tensor([1.0, -2.0, 0.5])
    found = per_example_loss(hidden, weight, labels, bias=bias, reduction=reduction)
    (gradient,) = torch.autograd.grad((found * factors).sum(), hidden)
    expected = plain(hidden, weight, labels, bias, reduction)
    (truth,) = torch.autograd.grad((expected * factors).sum(), hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * scale)
    assert (gradient - truth).norm() < 2e-6 * truth.norm()
    assert found.dtype == torch.float32


def test_rows_without_labels_have_no_loss_and_no_gradient(path):
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    labels = torch.full((2, 4), -100)
    labels[1, 2] = 3
    losses = per_example_loss(hidden, torch.randn(50, 8), labels, reduction="mean")
    losses.sum().backward()
    assert losses[0] == 0
    assert hidden.grad[0].abs().sum() == 0
    # Position 2 is predicted from position 1, and only there is a gradient.
    assert (hidden.grad[1].abs().sum(1) > 0).tolist() == [False, True, False, False]


def test_no_labels_at_all(path):
    hidden = torch.randn(2, 1, 8, requires_grad=True)
    losses = per_example_loss(hidden, torch.randn(50, 8), torch.zeros(2, 1, dtype=torch.long))
    losses.sum().backward()
    assert losses.tolist() == [0, 0]


def test_saturated_logits_stay_finite(path):
    hidden = torch.full((1, 3, 4), 1e4, requires_grad=True)
    losses = per_example_loss(hidden, torch.randn(20, 4) * 100, torch.tensor([[0, 1, 2]]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_reduced_in_float32(path, dtype):
    hidden, weight = torch.randn(2, 6, 8).to(dtype), torch.randn(300, 8).to(dtype)
    labels = torch.randint(0, 300, (2, 6))
    found = per_example_loss(hidden.requires_grad_(), weight, labels)
    torch.testing.assert_close(found.double(), plain(hidden, weight, labels), rtol=1e-5, atol=1e-4)
    found.sum().backward()
    assert hidden.grad.dtype == dtype


@pytest.mark.parametrize("label", [50, -1])
def test_a_label_outside_the_vocabulary_is_refused(label):
    labels = torch.tensor([[0, label, 1]])
    with pytest.raises(CaptureError, match="outside the vocabulary of 50"):
        per_example_loss(torch.randn(1, 3, 8), torch.randn(50, 8), labels)
