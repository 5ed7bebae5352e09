"""Optimisers against their textbook recursions."""

import pytest
import torch
from torch.testing import assert_close

from sparsify._optim import ScheduleFreeSign, rate


def test_schedule_free_sign_descent_is_the_papers():
    """Three sequences kept apart, as in Defazio et al. 2024, against the two-buffer form."""
    y = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    z, x, beta, lr = y.detach().clone(), y.detach().clone(), 0.95, 0.01
    optimiser = ScheduleFreeSign([y], lr=lr)
    for t in range(20):
        g = torch.randn_like(z)
        y.grad = g.clone()
        optimiser.step(t)
        z = z - lr * g.sign()
        c = 1 / (t + 1)
        x = (1 - c) * x + c * z
        assert_close(y.detach(), (1 - beta) * z + beta * x, rtol=1e-12, atol=1e-12)
    before = y.detach().clone()
    take_back = optimiser.settle()
    assert_close(y.detach(), x, rtol=1e-12, atol=1e-12)
    take_back()
    assert torch.equal(y.detach(), before)


@pytest.mark.parametrize("total", [5, 50, 5000])
def test_the_rate_ends_at_zero_after_the_last_step(total):
    warm = min(1000, total // 10)
    rates = [rate(t, warm, total) for t in range(total + 1)]
    assert rates[-1] == 0
    assert max(rates) == 1
    assert all(r > 0 for r in rates[:-1])
    assert all(a >= b for a, b in zip(rates[warm:], rates[warm + 1 :]))


def test_signum_steps_alike_in_pieces_and_whole():
    """A gradient that is not contiguous is taken whole; the update is elementwise, so both must agree to the bit."""
    torch.manual_seed(0)
    start, grads = torch.randn(700, 300), [torch.randn(300, 700) for _ in range(4)]
    found = []
    for contiguous in (True, False):
        weight = torch.nn.Parameter(start.clone())
        optimizer = ScheduleFreeSign([weight], lr=1e-2)
        for grad in grads:
            weight.grad = grad.T.contiguous() if contiguous else grad.T.clone(memory_format=torch.preserve_format)
            assert weight.grad.is_contiguous() == contiguous
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)
