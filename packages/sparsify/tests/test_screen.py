"""Screened selection: candidates by bf16 products, the choice that of float32 products whatever rounding did."""

import pytest
import torch
from torch.nn.functional import normalize

from sparsify import Sae, SaeConfig, _screen, _sparse
from sparsify._screen import screened_topk
from sparsify._select import row_topk

_N, _D, _M, _K = 300, 64, 2048, 8  # more rows than a trial has


def _factors(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(_N, _D, generator=generator), torch.randn(_M, _D, generator=generator)
    bias = torch.randn(_M, generator=generator)
    if kind == "alike":  # products that bf16 cannot tell apart: everything is doubtful
        weight, bias = weight[:1] + 1e-3 * weight, 1e-3 * bias
    elif kind == "uneven":  # one latent's weights, and its bias, a thousand times the others'
        weight[7] *= 1000
        bias[9] = 1000
    elif kind == "negative":  # nothing is above zero
        bias -= 100
    elif kind == "tiny":  # squares vanish
        x, bias = 1e-27 * x, 0 * bias
    elif kind == "huge":  # infinite in bf16
        x[0], weight[:, 0] = 0.0, 1e-3 * weight[:, 0]
        x[0, 0] = 3.4e38
    elif kind == "switched off":
        bias[4:] = -torch.inf
    elif kind == "one token":
        x = x[:1]
    elif kind == "no token":
        x = x[:0]
    return x, weight, bias


@pytest.mark.parametrize("kind", ["random", "alike", "uneven", "negative", "tiny", "one token", "no token"])
def test_choice_is_that_of_full_products(kind):
    x, weight, bias = _factors(kind)
    exact = x.double() @ weight.double().T + bias.double()
    found = screened_topk(x, weight, bias, _K)
    best = exact.topk(_K, dim=1).values
    scale = exact.abs().amax() if len(x) else 1.0
    assert found.indices.shape == (len(x), _K)
    torch.testing.assert_close(found.values.double().sort(1, descending=True).values, best, rtol=0, atol=3e-6 * scale)
    torch.testing.assert_close(found.values.double(), exact.gather(1, found.indices), rtol=0, atol=3e-6 * scale)
    assert all(len(row.unique()) == _K for row in found.indices)


def test_rounding_alone_would_choose_otherwise():
    """So that the test above can fail."""
    x, weight, bias = _factors("alike")
    rounded = torch.addmm(bias.bfloat16(), x.bfloat16(), weight.bfloat16().T).topk(_K, dim=1).indices.sort(1).values
    exact = torch.addmm(bias, x, weight.T).topk(_K, dim=1).indices.sort(1).values
    assert (rounded != exact).any(1).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["random", "alike", "uneven", "negative"])
def test_bound_covers_what_rounding_hides(kind):
    x, weight, bias = _factors(kind)
    screen = _screen._Screen(weight, bias, _K)
    _, least = screen.candidates(x)
    rounded = torch.addmm(bias.bfloat16(), x.bfloat16(), weight.bfloat16().T).float()
    exact = x.double() @ weight.double().T + bias.double()
    hidden = (exact - least[:, None]).masked_fill(rounded > least[:, None], float("-inf")).amax(1)
    assert (hidden <= screen.hidden(x, least)).all()


@pytest.mark.parametrize(("kind", "again"), [("random", 0), ("uneven", _N)])
def test_screening_gives_up_where_it_proves_nothing(kind, again, monkeypatch):
    rows = []
    in_full = _screen._Screen.in_full
    monkeypatch.setattr(_screen._Screen, "in_full", lambda self, x: (rows.append(len(x)), in_full(self, x))[1])
    screened_topk(*_factors(kind), _K)
    assert sum(rows) <= 0.1 * _N if not again else sum(rows) == again
    assert len(rows) <= 2


@pytest.mark.parametrize("kind", ["huge", "switched off"])
def test_infinite_products_are_chosen_as_in_full(kind):
    x, weight, bias = _factors(kind)
    found = screened_topk(x, weight, bias, _K).values.sort(1, descending=True).values
    torch.testing.assert_close(found, torch.addmm(bias, x, weight.T).topk(_K, dim=1).values)


def test_values_that_are_not_finite_reach_the_guard():
    x, weight, bias = _factors("random")
    x[3, 0] = float("nan")
    x[5, 0] = float("inf")
    found = screened_topk(x, weight, bias, _K)
    assert not found.values[3].isfinite().all()
    assert not found.values[5].isfinite().all()
    others = [row for row in range(_N) if row not in (3, 5)]
    best = torch.addmm(bias, x[others], weight.T).topk(_K, dim=1).values
    torch.testing.assert_close(found.values[others].sort(1, descending=True).values, best)


@pytest.mark.parametrize("width", [64, 2048, 1 << 17])
def test_bf16_blocks_are_ranked_with_their_places(width):
    block = torch.randn(5, width).bfloat16()
    block[0] = 1.0  # nothing but ties
    block[1, ::2] = -0.0
    block[2, ::2] = -torch.inf
    block[3, 5], block[3, 7] = torch.inf, -torch.inf
    values, indices = row_topk(block, 16)
    assert torch.equal(values.sort(1, descending=True).values, block.topk(16, dim=1).values)
    assert torch.equal(values, block.gather(1, indices))
    assert all(len(row.unique()) == 16 for row in indices)


def test_a_coder_that_screens_learns_the_same(monkeypatch):
    torch.manual_seed(0)
    coder, x = Sae(_D, SaeConfig(num_latents=_M, k=_K)), normalize(torch.randn(_N, _D))
    losses, gradients = [], []
    for screening in (False, True):
        monkeypatch.setattr(_sparse, "screens", lambda *_, screening=screening: screening)
        coder.zero_grad()
        fvu = coder(x).fvu
        fvu.backward()
        losses.append(fvu.item())
        gradients.append({name: each.grad.clone() for name, each in coder.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, each in gradients[0].items():
        torch.testing.assert_close(each, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_screens_only_where_it_pays():
    x, weight = torch.zeros(1024, 512), torch.zeros(8192, 512)
    assert _screen.screens(x, weight, 32) == _screen._fast_bf16()
    assert not _screen.screens(x[1:], weight, 32)
    assert not _screen.screens(x.double(), weight.double(), 32)
    assert not _screen.screens(x, weight, 65)
    assert not _screen.screens(x[:, :64], weight[:, :64], 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _screen.screens(x, weight, 32)
