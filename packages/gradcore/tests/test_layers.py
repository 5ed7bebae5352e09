"""Every layer type, with and without bias and sketch, against autograd one example at a time."""

from __future__ import annotations

import pytest
import torch
from gradcore_models import Conv1D, TinyLM
from gradcore_reference import planned_one_by_one, relative
from torch import nn

from gradcore import CapturePlan, GradientCollector, TwoSided
from gradcore.layers import layer_for

EXAMPLES = 4


class LlamaRMSNorm(nn.Module):
    """Named and built as in transformers."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = 1e-5

    def forward(self, x):
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * exact.to(x.dtype)


class Tied(nn.Module):
    """One table looked up twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, ids):
        return self.table(ids) * torch.tanh(self.table(ids.flip(1)))


def dense(*shape):
    return lambda: torch.randn(EXAMPLES, *shape)


def ids(entries, *shape):
    return lambda: torch.randint(0, entries, (EXAMPLES, *shape))


CASES = {
    "linear 2-d": (lambda: nn.Linear(5, 7), dense(5)),
    "linear 3-d": (lambda: nn.Linear(5, 7), dense(6, 5)),
    "linear 4-d": (lambda: nn.Linear(5, 7), dense(2, 3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 7, bias=False), dense(6, 5)),
    "hf conv1d": (lambda: Conv1D(7, 5), dense(6, 5)),
    "embedding": (lambda: nn.Embedding(11, 6), ids(11, 5)),
    "embedding with padding": (lambda: nn.Embedding(11, 6, padding_idx=0), ids(3, 5)),
    "embedding twice": (Tied, ids(11, 5)),
    "layer norm": (lambda: _jittered(nn.LayerNorm(6)), dense(5, 6)),
    "rms norm": (lambda: _jittered(nn.RMSNorm(6)), dense(5, 6)),
    "llama rms norm": (lambda: LlamaRMSNorm(6), dense(5, 6)),
    "group norm": (lambda: _jittered(nn.GroupNorm(2, 6)), dense(6, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), dense(4, 9)),
    "conv1d strided, dilated, reflected": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=3, padding_mode="reflect"),
        dense(4, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(1, 2)), dense(3, 6, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), dense(4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2), dense(4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), dense(2, 3, 4, 5)),
}


def _jittered(norm):
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("sketch", [None, TwoSided(3)], ids=["whole", "sketched"])
@pytest.mark.parametrize("bias", [False, True], ids=["weight", "weight and bias"])
@pytest.mark.parametrize("case", CASES)
def test_equals_autograd(case, bias, sketch):
    make, sample = CASES[case]
    model, x = nn.Sequential(make()), sample()
    weights = torch.randn(model(x).shape)
    plan = CapturePlan.for_model(model, sketch=sketch, include_bias=bias)
    assert all(planned.bias <= bias for planned in plan.modules)

    def loss(part):
        return (torch.sin(model(x[part])) * weights[part]).sum()

    with GradientCollector(model, plan) as collector:
        loss(slice(None)).backward()
    truth = planned_one_by_one(model, lambda row: loss(slice(row, row + 1)), EXAMPLES, plan)
    for planned in plan.modules:
        expected = truth[planned.name]
        if sketch is not None:
            expected = _sketched(sketch, planned, expected)
        found = collector.gradients[planned.name]
        assert found.shape == expected.shape
        for row in range(EXAMPLES):
            assert relative(found[row], expected[row]) < 2e-6


def _sketched(sketch, planned, gradients):
    if not planned.elementwise:
        left = sketch.matrix(planned.name, "left", planned.out_features)
        return left @ gradients @ sketch.matrix(planned.name, "right", planned.in_features).T
    flat, rows = gradients.flatten(1), sketch.side**2
    if flat.shape[1] <= rows:
        return flat
    return flat @ sketch.matrix(planned.name, "vector", flat.shape[1], rows=rows).T


def test_a_whole_model_with_every_parameter():
    model, x = TinyLM(), torch.randint(0, 23, (EXAMPLES, 6))
    plan = CapturePlan.for_model(model, exclude="head", include_bias=True)
    assert [planned.kind for planned in plan.modules][:4] == ["embedding", "layer_norm", "hf_conv1d", "linear"]

    def loss(part):
        return model.hidden(x[part]).square().sum()

    with GradientCollector(model, plan) as collector:
        loss(slice(None)).backward()
    truth = planned_one_by_one(model, lambda row: loss(slice(row, row + 1)), EXAMPLES, plan)
    for name, expected in truth.items():
        assert relative(collector.gradients[name], expected) < 2e-6


def test_a_table_looked_up_once_for_the_whole_batch():
    """Position tables: ids [1, s], added to every example."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(5, 6)

        def forward(self, ids):
            return self.tokens(ids) + self.places(torch.arange(ids.shape[1])[None])

    model, x = Positions(), torch.randint(0, 11, (EXAMPLES, 5))
    plan = CapturePlan.for_model(model)
    with GradientCollector(model, plan) as collector:
        model(x).sin().sum().backward()
    truth = planned_one_by_one(model, lambda row: model(x[row : row + 1]).sin().sum(), EXAMPLES, plan)
    for name in ("tokens", "places"):
        assert relative(collector.gradients[name], truth[name]) < 2e-6


def test_the_unit_offset_of_gemma_norms_does_not_matter():
    class GemmaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(6) * 0.1), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    model, x = nn.Sequential(GemmaRMSNorm()), torch.randn(EXAMPLES, 5, 6)
    plan = CapturePlan.for_model(model)
    with GradientCollector(model, plan) as collector:
        model(x).sin().sum().backward()
    truth = planned_one_by_one(model, lambda row: model(x[row : row + 1]).sin().sum(), EXAMPLES, plan)
    assert relative(collector.gradients["0"], truth["0"]) < 2e-6


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(4, 2, max_norm=1.0),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.ConvTranspose1d(2, 2, 2),
        nn.ReLU(),
    ],
)
def test_what_cannot_be_captured_exactly_is_not_taken(module):
    assert layer_for(module) is None
