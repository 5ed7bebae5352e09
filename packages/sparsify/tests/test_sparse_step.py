"""The sparse step against dense autograd: values, every gradient, and the corners where they could part."""

import pytest
import torch
from dense_reference import dense_losses, gradients
from torch.testing import assert_close

from sparsify import ConfigError, DataError, SaeConfig, SparseCoder
from sparsify._select import Above, BatchTopK, row_topk
from sparsify._sparse import Routes, chosen_products

CASES = {
    "topk": SaeConfig(k=3, num_latents=90),
    "topk dense": SaeConfig(k=20, num_latents=90),
    "k is all": SaeConfig(k=90, num_latents=90),
    "k is one": SaeConfig(k=1, num_latents=90),
    "groupmax": SaeConfig(activation="groupmax", k=5, num_latents=90),
    "batchtopk": SaeConfig(activation="batchtopk", k=3, num_latents=90),
    "jumprelu": SaeConfig(activation="jumprelu", k=3, num_latents=90),
    "gated": SaeConfig(activation="gated", k=3, num_latents=90),
    "multi": SaeConfig(k=3, num_latents=130, multi_topk=True),
    "matryoshka": SaeConfig(activation="batchtopk", k=3, num_latents=90, matryoshka=(10, 33, 90)),
    "matryoshka and multi": SaeConfig(k=3, num_latents=130, matryoshka=(10, 33, 130), multi_topk=True),
    "tied": SaeConfig(k=3, num_latents=90, tied=True),
    "transcoder": SaeConfig(k=3, num_latents=90, transcode=True),
    "skip": SaeConfig(k=3, num_latents=90, transcode=True, skip_connection=True),
}


def random_coder(cfg, d_in=7, d_out=None, dtype=torch.float64):
    coder = SparseCoder(d_in, cfg, dtype=dtype, d_out=d_out)
    for name, p in coder.named_parameters():
        p.data = torch.randn_like(p) * (0.3 if "b" in name or "r_mag" in name else 0.6)
    if cfg.tied:
        coder.W_dec = coder.encoder.weight
    if cfg.activation == "jumprelu":
        coder.threshold.data = torch.rand_like(coder.threshold) + 0.4
        coder.bandwidth.fill_(0.5)
    return coder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss", ["fvu", "auxk_loss", "multi_topk_fvu", "nested_fvu", "sparsity_loss"])
def test_every_loss_and_gradient_equals_dense_autograd(name, loss):
    cfg = CASES[name]
    coder = random_coder(cfg, d_out=11 if cfg.transcode else None)
    x = torch.randn(23, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randn(23, 11, dtype=torch.float64) if cfg.transcode else x
    dead = torch.rand(coder.num_latents) < 0.4 if cfg.k < 60 else None
    want_out, want_code, want = dense_losses(coder, x, y, dead)
    got = coder(x, y if cfg.transcode else None, dead_mask=dead)

    assert_close(got.sae_out, want_out, rtol=1e-10, atol=1e-12)
    code = torch.zeros_like(want_code).scatter_add(1, got.latent_indices, got.latent_acts)
    assert_close(code, want_code, rtol=1e-10, atol=1e-12)
    if loss not in want or not want[loss].requires_grad:
        assert getattr(got, loss) == 0
        return
    assert_close(getattr(got, loss), want[loss], rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients(getattr(got, loss), coder, x), gradients(want[loss], coder, x)):
        assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_gradients_in_single_precision():
    coder = random_coder(SaeConfig(k=8, num_latents=300), d_in=33, dtype=torch.float32)
    x = torch.randn(50, 33)
    got, (_, _, want) = coder(x), dense_losses(coder, x, x)
    for found, expected in zip(gradients(got.fvu, coder), gradients(want["fvu"], coder)):
        assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["auxk_loss", "multi_topk_fvu"])
def test_auxiliary_losses_reach_the_encoder(loss):
    coder = random_coder(SaeConfig(k=3, num_latents=130, multi_topk=True))
    x = torch.randn(23, 7, dtype=torch.float64)
    dead = torch.rand(130) < 0.4
    out = coder(x, dead_mask=dead)
    (g,) = torch.autograd.grad(getattr(out, loss), coder.encoder.weight)
    touched = g.abs().sum(1) > 0
    assert touched.any()
    if loss == "auxk_loss":
        assert not touched[~dead].any()


def test_auxk_does_not_depend_on_the_output_bias_or_the_living():
    coder = random_coder(SaeConfig(k=3, num_latents=90, transcode=True))
    x = torch.randn(23, 7, dtype=torch.float64)
    dead = torch.arange(90) < 40
    loss = coder(x, x, dead_mask=dead).auxk_loss
    g_bias, g_dec = torch.autograd.grad(loss, [coder.b_dec, coder.W_dec], allow_unused=True)
    assert g_bias is None
    assert not g_dec[40:].any()


def test_a_chosen_latent_without_activation_gets_no_gradient():
    coder = random_coder(SaeConfig(k=5, num_latents=90))
    coder.encoder.bias.data -= 100
    out = coder(torch.randn(23, 7, dtype=torch.float64))
    assert not out.latent_acts.any()
    assert not torch.autograd.grad(out.fvu, coder.encoder.weight)[0].any()


def test_duplicate_latents_and_equal_tokens():
    coder = random_coder(SaeConfig(k=4, num_latents=90))
    coder.encoder.weight.data[45:] = coder.encoder.weight.data[:45]
    coder.encoder.bias.data[45:] = coder.encoder.bias.data[:45]
    coder.W_dec.data[45:] = coder.W_dec.data[:45]
    x = torch.randn(1, 7, dtype=torch.float64).expand(9, 7)
    y = torch.randn(9, 7, dtype=torch.float64)
    _, _, want = dense_losses(coder, x, y)
    got = coder(x, y)
    assert_close(got.fvu, want["fvu"])
    # Ties may be broken either way, but a pair of twins gets the same gradient in sum.
    found, expected = (torch.autograd.grad(loss, coder.W_dec)[0] for loss in (got.fvu, want["fvu"]))
    assert_close(found[:45] + found[45:], expected[:45] + expected[45:])


def test_an_empty_batch_is_a_batch():
    for cfg in (CASES["topk"], CASES["batchtopk"], CASES["jumprelu"]):
        coder = random_coder(cfg)
        acts, indices, _ = coder.encode(torch.zeros(0, 7, dtype=torch.float64))
        assert coder.decode(acts, indices).shape == (0, 7)


def test_blocks_do_not_change_anything(monkeypatch):
    coder = random_coder(CASES["jumprelu"])
    x = torch.randn(23, 7, dtype=torch.float64)
    whole = coder(x)
    monkeypatch.setattr("sparsify._sparse.BLOCK_BYTES", 4 * 90 * 8)
    blocked = coder(x)
    assert_close(blocked.sae_out, whole.sae_out, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(blocked.fvu, coder), gradients(whole.fvu, coder)):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("width", "k"), [(2048, 32), (90, 3), (97, 5), (64, 64), (1024, 300), (4096, 1)])
def test_row_topk_is_topk(width, k, threads):
    torch.set_num_threads(threads)
    block = torch.randn(300, width, dtype=torch.float64)  # no ties
    values, indices = row_topk(block, k)
    assert_close(values.sort(1, descending=True).values, block.topk(k).values, rtol=0, atol=0)
    assert torch.equal(indices.sort(1).values, block.topk(k).indices.sort(1).values)
    assert torch.equal(block.gather(1, indices), values)
    assert torch.equal(row_topk(block, k, in_order=True)[1], block.topk(k).indices)


def test_batchtopk_widens_until_exact():
    # One token owns nearly all large products, so eight times k offers per row are too few.
    x = torch.full((12, 1), 0.01, dtype=torch.float64)
    x[3] = 5.0
    weight = 1 + torch.rand(200, 1, dtype=torch.float64)
    rule = BatchTopK(2, 200)
    found = chosen_products(x, weight, torch.zeros(200, dtype=torch.float64), None, [rule])
    assert rule.width > 16
    got = torch.zeros(12, 200, dtype=torch.float64).scatter_add(1, found.routes.indices, found.values)
    dense = x @ weight.T
    best = dense.flatten().topk(24).indices
    want = torch.zeros(2400, dtype=torch.float64).index_copy(0, best, dense.flatten()[best]).view(12, 200)
    assert_close(got, want)


def test_routes_skip_padding():
    chosen = Above(torch.tensor(0.5)).take(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]))
    assert chosen.valid is not None
    routes = Routes(chosen.indices, chosen.valid, 3 * 8 * 8)
    totals = routes.total_by_latent(torch.ones_like(chosen.values))
    assert totals[:3].tolist() == [1, 1, 1]
    assert_close(
        routes.sum_by_latent(chosen.values, torch.eye(3))[:3], torch.tensor([[0.0, 0, 3], [1, 0, 0], [2, 0, 0]])
    )


def test_no_gradient_is_asked_for_twice():
    coder = random_coder(CASES["topk"])
    loss = coder(torch.randn(5, 7, dtype=torch.float64)).fvu
    (g,) = torch.autograd.grad(loss, coder.W_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_half_precision_products_under_autocast():
    coder = random_coder(SaeConfig(k=8, num_latents=256), d_in=32, dtype=torch.float32)
    x = torch.randn(128, 32)
    exact = coder(x).fvu.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = coder(x).fvu.item()
        acts, indices, _ = coder.encode(x)
    assert rough != exact, "a few choices differ"
    assert abs(rough - exact) < 2e-3 * exact
    exactly = ((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias).relu().gather(1, indices)
    assert_close(acts, exactly, rtol=1e-5, atol=1e-5, msg="chosen in bf16, valued in fp32")
    assert acts.dtype == torch.float32


def test_weights_in_half_precision():
    torch.manual_seed(0)
    coder = random_coder(SaeConfig(k=8, num_latents=256), d_in=32, dtype=torch.float32)
    x = torch.randn(256, 32)
    exact = coder(x).fvu.item()
    assert abs(coder.bfloat16()(x).fvu.item() - exact) < 2e-2 * exact


def test_wrong_widths_and_counts_are_refused():
    with pytest.raises(ConfigError, match="more than the 8 latents"):
        SparseCoder(4, SaeConfig(k=9, num_latents=8))
    with pytest.raises(ConfigError, match="does not divide"):
        SparseCoder(4, SaeConfig(k=3, num_latents=8, activation="groupmax"))
    with pytest.raises(ConfigError, match="did you mean 'topk'"):
        SaeConfig(activation="topkk")
    with pytest.raises(DataError, match="width 4"):
        SparseCoder(4, SaeConfig(k=3)).encode(torch.zeros(2, 5))


def test_row_topk_with_ties_and_nan():
    """Equal values and NaN fool a choice by value; it must notice, whatever the other rows hold."""
    block = torch.randn(40, 512, dtype=torch.float64)
    block[3] = 0.0
    block[4, 100:140] = 5.0
    values, indices = row_topk(block, 8)
    assert_close(values.sort(1, descending=True).values, block.topk(8).values, rtol=0, atol=0)
    assert all(len(set(row)) == 8 for row in indices.tolist())
    # One place too many in one row and one too few in another: the count alone looks right.
    block = torch.randn(2, 64, dtype=torch.float64)
    block[0] = torch.arange(64)
    block[0, 60] = torch.nan
    block[1] = torch.arange(64)
    block[1, 61] = block[1, 60]
    assert sorted(row_topk(block, 4)[0][1].tolist()) == [60, 60, 62, 63]
    _, indices = row_topk(block, 4)
    assert indices.min() >= 0
    assert indices.max() < 64


@pytest.mark.parametrize("latents", [90, 70_000])
def test_entries_are_sorted_by_latent_and_stably(latents):
    indices = torch.randint(latents, (50, 7))
    entry, token, begin = Routes(indices, None, latents).by_latent()
    latent = indices.flatten()[entry]
    assert (latent.diff() >= 0).all()
    assert (entry.diff()[latent.diff() == 0] > 0).all()
    assert torch.equal(token, entry // 7)
    assert torch.equal(begin, torch.searchsorted(latent, torch.arange(latents)))


AUTOCAST = {
    "topk": SaeConfig(k=8, num_latents=256),
    "topk wide": SaeConfig(k=64, num_latents=256),
    "multi wide": SaeConfig(k=16, num_latents=256, multi_topk=True),
    "matryoshka": SaeConfig(k=64, num_latents=256, matryoshka=(32, 256)),
    "tied": SaeConfig(k=64, num_latents=256, tied=True),
    "skip": SaeConfig(k=64, num_latents=256, transcode=True, skip_connection=True),
    "groupmax": SaeConfig(activation="groupmax", k=64, num_latents=256),
    "batchtopk": SaeConfig(activation="batchtopk", k=64, num_latents=256),
    "jumprelu": SaeConfig(activation="jumprelu", k=64, num_latents=256),
    "gated": SaeConfig(activation="gated", k=64, num_latents=256),
}


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_every_activation_trains_under_autocast(name, inside):
    """However wide its code: chosen in bf16, everything else in fp32, backward too."""
    coder = random_coder(AUTOCAST[name], d_in=32, dtype=torch.float32)
    x = torch.randn(128, 32)
    dead = torch.arange(256) < 100

    def losses():
        out = coder(x, x + 1, dead_mask=dead)
        return out.fvu + out.auxk_loss + out.multi_topk_fvu + out.nested_fvu + out.sparsity_loss

    exact = losses()
    wanted = gradients(exact, coder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = losses()
        found = gradients(rough, coder) if inside else None
        acts = coder.encode(x).top_acts
    found = gradients(rough, coder) if found is None else found
    assert acts.dtype == rough.dtype == torch.float32
    assert_close(rough, exact, rtol=1e-2, atol=0)
    for got, want in zip(found, wanted):
        assert (got - want).norm() <= 5e-2 * want.norm() + 1e-6
