"""Shapes, initialisation, norms, thresholds: what a coder promises between steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import sparsify
import sparsify.activations
from sparsify import ConfigError, Sae, SaeConfig, SparseCoder
from sparsify._config import ACTIVATIONS
from sparsify.activations import activation_named


def test_the_encode_loop_of_the_readme():
    sae = Sae(16, SaeConfig(k=4, expansion_factor=8))
    hidden = torch.randn(2, 5, 16)
    with torch.inference_mode():
        flat, shaped = sae.encode(hidden.flatten(0, 1)), sae.encode(hidden)
    assert flat.top_acts.shape == flat.top_indices.shape == (10, 4)
    assert shaped.top_acts.shape == (2, 5, 4)
    assert torch.equal(shaped.top_acts.flatten(0, 1), flat.top_acts)
    assert sae.decode(shaped.top_acts, shaped.top_indices).shape == (2, 5, 16)
    assert sae.encode(hidden[0, 0]).top_acts.shape == (4,)


def test_pre_acts_are_all_latents_after_the_relu():
    sae = Sae(16, SaeConfig(k=4, expansion_factor=8))
    x = torch.randn(3, 16)
    every = sae.encode(x, pre_acts=True)
    assert every.pre_acts is not None
    assert_close(every.pre_acts.topk(4, sorted=False).values.sort().values, every.top_acts.sort().values)
    assert sae.encode(x).pre_acts is None


def test_initialisation_ties_the_decoder_and_centres_the_biases():
    sae = Sae(16, SaeConfig(k=4))
    norms = sae.encoder.weight.norm(dim=1, keepdim=True)
    assert_close(sae.W_dec, sae.encoder.weight / norms)
    x, y = torch.randn(50, 16) + 3, torch.randn(50, 24) - 1
    sae.initialise(x, x)
    assert_close(sae.b_dec, x.mean(0))
    transcoder = SparseCoder(16, SaeConfig(k=4, transcode=True), d_out=24)
    transcoder.initialise(x, y)
    assert not transcoder.W_dec.any()
    assert_close(transcoder(x, y).fvu, torch.tensor(1.0), msg="a fresh transcoder predicts the mean")
    assert_close(transcoder.encoder(x.mean(0)), torch.zeros(512), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_the_encoder_starts_at_the_scale_that_explains_most(activation):
    sae = Sae(16, SaeConfig(k=4, activation=activation))
    x = 30 * torch.randn(300, 16) + 5
    sae.initialise(x, x)
    best, weight = sae(x).fvu.item(), sae.encoder.weight.detach().clone()
    for factor in (0.9, 0.99, 1.01, 1.1):
        sae.encoder.weight.data = weight * factor
        assert sae(x).fvu.item() > best


def test_jumprelu_starts_with_four_k_active():
    sae = Sae(16, SaeConfig(k=8, activation="jumprelu"))
    x = torch.randn(400, 16)
    sae.initialise(x, x)
    sae.eval()
    active = (sae.encode(x).top_acts > 0).sum(1).float().mean()
    assert 16 < active < 48


def test_norms_and_projected_gradients():
    sae = Sae(16, SaeConfig(k=4))
    sae(torch.randn(20, 16)).fvu.backward()
    sae.remove_gradient_parallel_to_decoder_directions()
    g, w = sae.W_dec.grad, sae.W_dec
    assert ((g * w).sum(1).abs() <= 1e-6 * g.norm(dim=1) + 1e-12).all()
    torch.optim.SGD(sae.parameters(), lr=1.0).step()
    sae.after_step()
    assert_close(w.norm(dim=1), torch.ones(len(w)), rtol=0, atol=1e-6)


def test_tied_rows_are_normalised_where_asked_for():
    for normalize in (True, False):
        sae = Sae(16, SaeConfig(k=4, tied=True, normalize_decoder=normalize))
        assert sae.W_dec is sae.encoder.weight
        sae.W_dec.data *= 3
        sae.after_step()
        unit = (sae.W_dec.norm(dim=1) - 1).abs() < 1e-6
        assert bool(unit.all()) == bool(unit.any()) == normalize


def test_norms_in_half_precision():
    sae = Sae(16, SaeConfig(k=4), dtype=torch.bfloat16)
    sae.W_dec.data *= 3
    sae.after_step()
    assert_close(sae.W_dec.float().norm(dim=1), torch.ones(512), rtol=0, atol=1e-2)


def test_batchtopk_learns_the_threshold_it_needs_outside_a_batch():
    sae = Sae(16, SaeConfig(k=4, activation="batchtopk"))
    x = torch.randn(200, 16)
    with pytest.raises(ConfigError, match="no learned threshold"):
        sae.eval().encode(x)
    batch = sae.train().encode(x)
    assert (batch.top_acts > 0).sum() == 4 * 200
    sae.activation.observe(sae, torch.zeros(3, 4))  # a batch that kept nothing teaches nothing
    assert sae.threshold == -1
    sae.activation.observe(sae, batch.top_acts * (1 - 1e-6))
    alone = sae.eval().encode(x)
    assert (alone.top_acts > 0).sum() == 4 * 200


@pytest.mark.parametrize("cfg", [SaeConfig(k=4), SaeConfig(k=4, activation="groupmax"), SaeConfig(k=4, tied=True)])
def test_perfect_and_mean_reconstruction_give_fvu_zero_and_one(cfg):
    sae = Sae(16, cfg)
    x = torch.randn(30, 16)
    out = sae(x).sae_out.detach()
    assert_close(sae(x, out).fvu, torch.tensor(0.0))
    sae.encoder.bias.data -= 100
    sae.b_dec.data = x.mean(0)
    assert_close(sae(x).fvu, torch.tensor(1.0))


def test_chunks_add_up_to_the_batch():
    sae = Sae(16, SaeConfig(k=4, expansion_factor=4))
    x = torch.randn(30, 16)
    variance = (x - x.mean(0)).square().sum()
    whole = torch.autograd.grad(sae(x).fvu, list(sae.parameters()))
    chunks = [torch.autograd.grad(sae(c, total_variance=variance).fvu, list(sae.parameters())) for c in x.split(7)]
    for g, parts in zip(whole, zip(*chunks)):
        assert_close(sum(parts), g, rtol=1e-5, atol=1e-7)


def test_options_that_cannot_stand_together():
    with pytest.raises(ConfigError, match="cannot be tied"):
        SaeConfig(tied=True, transcode=True)
    with pytest.raises(ConfigError, match="multi_topk needs"):
        SaeConfig(multi_topk=True, activation="groupmax")
    with pytest.raises(ConfigError, match="rise strictly"):
        SaeConfig(matryoshka=(8, 8))
    with pytest.raises(ConfigError, match="end at all latents: found 8, expected 512"):
        Sae(16, SaeConfig(matryoshka=(4, 8)))
    with pytest.raises(ConfigError, match="set transcode=True"):
        SparseCoder(16, SaeConfig(), d_out=8)


def test_public_names():
    for name in sparsify.__all__:
        assert getattr(sparsify, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SAE'"):
        sparsify.SAE  # noqa: B018


def test_importing_costs_no_torch():
    code = "import sys, sparsify; sparsify.SaeConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_activation_is_a_file_of_its_name():
    folder = Path(sparsify.activations.__file__).parent
    assert {path.stem for path in folder.glob("[!_]*.py")} == set(ACTIVATIONS)
    for name in ACTIVATIONS:
        assert isinstance(activation_named(name), sparsify.activations.Activation)
