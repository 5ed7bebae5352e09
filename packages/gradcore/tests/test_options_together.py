"""Normaliser × bias × sketch × row a position × heads: each alone is tested elsewhere, here they meet.

The reference writes every row out: inputs and output gradients of the modules taken by autograd, multiplied position by
position, a column of ones for the bias, times the scales, cut into heads, and sketched by sketching the whole matrix.
"""

from __future__ import annotations

import pytest
import torch
from gradcore_models import TinyLM
from torch import Tensor

from gradcore import AttentionConfig, CapturePlan, GradientCollector, Identity, Normalizer, TensorSketch, TwoSided

IDS = torch.randint(0, 23, (3, 5), generator=torch.Generator().manual_seed(1))
NAMES = ("blocks.0.up", "blocks.1.down")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM()


@pytest.fixture(scope="module")
def outer_products(model) -> dict[str, Tensor]:
    """Of each module ``[examples, positions, out, in + 1]``, from what autograd says of its inputs and outputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            seen[name] = (inputs[0].detach(), output)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in NAMES]
    model.head(model.hidden(IDS)).square().sum().backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (x, output) in seen.items():
        ones = torch.cat((x, torch.ones_like(x[..., :1])), dim=-1)
        found[name] = torch.einsum("nso,nsi->nsoi", output.grad, ones)
    model.zero_grad()
    return found


SKETCHES = {"whole": Identity(), "two-sided": TwoSided(3, seed=2), "tensor": TensorSketch(12, seed=2)}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["", "adam", "adafactor"])
def test_any_options_together_are_their_definition(model, outer_products, kind, bias, sketch, per_position, heads):
    attention = {"blocks.1.down": AttentionConfig(2, 4)} if heads else {}
    plan = CapturePlan.for_model(model, list(NAMES), include_bias=bias, attention=attention)
    scales = {name: torch.ones(16 if "up" in name else 8, (8 if "up" in name else 16) + bias) for name in NAMES}
    normalizer = None
    if kind:
        draw = torch.Generator().manual_seed(3)
        moments = {name: torch.rand(one.shape, generator=draw) + 0.1 for name, one in scales.items()}
        normalizer = Normalizer.of_moments(kind, moments)
        scales = {name: by_hand(kind, v) for name, v in moments.items()}
    plan = CapturePlan(plan.modules, SKETCHES[sketch], normalizer=normalizer)
    with GradientCollector(model, plan, per_position=per_position) as collector:
        model.head(model.hidden(IDS)).square().sum().backward()
        found = collector.rows.clone()

    expected = []
    for planned in plan.modules:
        whole = outer_products[planned.path]
        whole = whole.flatten(0, 1) if per_position else whole.sum(1)
        whole = (whole if bias else whole[..., :-1]) * scales[planned.path]
        if heads and planned.path == "blocks.1.down":
            number = int(planned.name[-1])
            whole = whole[:, 4 * number : 4 * number + 4]
        bound = plan.sketch.bind(planned.name, *whole.shape[1:], CPU)
        expected.append(bound.matrix(whole).flatten(1))
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=2e-5, atol=1e-5)


def by_hand(kind: str, v: Tensor) -> Tensor:
    if kind == "adam":
        return 1 / (v.sqrt() + 1e-8)
    return (v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()) ** -0.5


@pytest.mark.parametrize("sketch", [Identity(), TwoSided(3), TensorSketch(12)], ids=lambda each: each.kind)
def test_half_precision_under_tiny_moments_stays_finite(model, sketch):
    """Adam's denominators of 1e-6 lift gradients beyond what float16 can hold: products are formed in float32."""
    half = TinyLM()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.float16)
    plan = CapturePlan.for_model(half, list(NAMES))
    moments = {m.path: torch.full((m.out_features, m.in_features), 1e-12) for m in plan.modules}
    normalizer = Normalizer.of_moments("adam", moments)
    plan = CapturePlan(plan.modules, sketch, normalizer=normalizer)

    def rows(of: TinyLM) -> Tensor:
        with GradientCollector(of, plan) as collector:
            of.head(of.hidden(IDS)).float().square().sum().backward()
            return collector.rows.clone()

    found, exact = rows(half), rows(model)
    assert exact.abs().max() > torch.finfo(torch.float16).max
    assert torch.isfinite(found).all()
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_neither_loss_nor_parameter_gradients_change_under_a_collector(model):
    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model.head(model.hidden(IDS)).square().mean()
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, gradients = step()
    with GradientCollector(model, CapturePlan.for_model(model, sketch=TwoSided(3)), freeze=False):
        captured_loss, captured = step()
    model.zero_grad()
    assert torch.equal(loss, captured_loss)
    assert captured.keys() == gradients.keys()
    assert all(torch.equal(captured[name], gradients[name]) for name in gradients)


def test_one_examples_row_is_the_weights_gradient_and_rows_sum_to_the_batchs(model):
    plan = CapturePlan.for_model(model, list(NAMES))

    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with GradientCollector(model, plan, freeze=False) as collector:
            model.head(model.hidden(ids)).square().sum().backward()
            up, down = (model.get_submodule(name).weight.grad for name in NAMES)
            return collector.rows.clone(), torch.cat((up.T.flatten(), down.flatten()))

    for row in range(3):
        found, gradient = run(IDS[row : row + 1])
        torch.testing.assert_close(found[0], gradient, rtol=1e-5, atol=1e-6)
    found, gradient = run(IDS)
    torch.testing.assert_close(found.sum(0), gradient, rtol=1e-5, atol=1e-6)
    model.zero_grad()


def test_positions_without_influence_count_for_nothing(model):
    """Two rows padded to one length are what they are alone, and padding that carries a loss is not."""
    plan = CapturePlan.for_model(model, list(NAMES))

    def rows(ids: Tensor, weight: Tensor) -> Tensor:
        with GradientCollector(model, plan) as collector:
            (model.head(model.hidden(ids)).square().sum(-1) * weight).sum().backward()
            return collector.rows.clone()

    alone = rows(IDS[:1, :3], torch.ones(1, 3))
    mask = torch.tensor([[1.0, 1, 1, 0, 0]])
    torch.testing.assert_close(rows(IDS[:1], mask), alone, rtol=1e-5, atol=1e-6)
    assert float((rows(IDS[:1], torch.ones(1, 5)) - alone).norm()) > 0.1 * float(alone.norm())


def test_the_first_positions_reach_the_row_without_a_loss_of_their_own(model):
    """Of a prompt only the answer's loss counts, yet its positions are part of the row (Bergson left them out)."""
    plan = CapturePlan.for_model(model, list(NAMES))
    with GradientCollector(model, plan, per_position=True) as collector:
        model.head(model.hidden(IDS))[:, 3:].square().sum().backward()
        positions = collector.rows.unflatten(0, IDS.shape).norm(dim=2)
    assert (positions[:, :3] > 0).all()
    assert float(positions[:, :3].sum() / positions.sum()) > 0.1
