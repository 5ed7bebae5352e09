"""Evaluation: exact at its fixed points, and equal to formulas on whole tensors."""

import json

import pytest
import torch
from small import Tiny, token_rows
from torch import nn
from torch.testing import assert_close

from sparsify import (
    ConfigError,
    DataError,
    HookpointError,
    SaeConfig,
    SparseCoder,
    TrainConfig,
    Trainer,
    evaluate,
    grafted,
    top_contexts,
)
from sparsify._evaluate import DENSITY_EDGES

ROWS = token_rows(12, 10)


def identity(width=12):
    """An SAE that is the identity: latents are the positive and negative parts of each coordinate."""
    sae = SparseCoder(width, SaeConfig(k=width, num_latents=2 * width, normalize_decoder=False), dtype=torch.float64)
    eye = torch.eye(width, dtype=torch.float64)
    sae.encoder.weight.data = torch.cat([eye, -eye])
    sae.W_dec.data = torch.cat([eye, -eye])
    return sae


def trained(tmp_path, **changes):
    coder = SaeConfig(k=4, num_latents=48, **changes)
    cfg = TrainConfig(coder, batch_size=4, hookpoints=["layers.?"], save_dir=str(tmp_path), lr=1e-2)
    trainer = Trainer(cfg, token_rows(200), Tiny())
    trainer.fit()
    return trainer.saes


def test_an_identity_graft_changes_nothing():
    model = Tiny().double()
    result = evaluate(model, {"layers.1": identity(), "layers.0.attn": identity()}, ROWS, batch_size=5)
    for name in result.grafted:
        assert_close(result.grafted[name].kl, 0.0, rtol=0, atol=1e-12)
        assert_close(result.grafted[name].ce, result.clean_ce, rtol=1e-12, atol=0)
        assert_close(result.recovered[name], 1.0, rtol=1e-9, atol=0)
        assert result.grafted[name].agreement == 1
        assert_close(result.reconstruction[name].fvu, 0.0, rtol=0, atol=1e-25)
        assert result.zero[name].kl > 1e-4
    assert result.together is not None
    assert_close(result.together.kl, 0.0, rtol=0, atol=1e-12)


class WithError(SparseCoder):
    """Reconstruction plus its error term: (Wx + e) with e = x − Wx is x again (Marks et al. 2024, §3.1)."""

    def reconstruct(self, x):
        guess = super().reconstruct(x)
        return guess + (x - guess)


def test_a_coder_with_its_error_term_changes_nothing():
    coder = WithError(12, SaeConfig(k=3, num_latents=24), dtype=torch.float64)
    result = evaluate(Tiny().double(), {"layers.1": coder}, ROWS, batch_size=5)
    assert_close(result.grafted["layers.1"].kl, 0.0, rtol=0, atol=1e-12)
    plain = SparseCoder(12, SaeConfig(k=3, num_latents=24), dtype=torch.float64)
    plain.load_state_dict(coder.state_dict())
    assert evaluate(Tiny().double(), {"layers.1": plain}, ROWS, batch_size=5).grafted["layers.1"].kl > 1e-6


def test_every_number_is_its_formula(tmp_path):
    model = Tiny()
    coders = trained(tmp_path)
    result = evaluate(model, coders, ROWS, batch_size=5)
    rows = ROWS  # the last batch is short
    labels = rows[:, 1:].flatten()
    with torch.no_grad():
        clean = model(rows)[:, :-1].flatten(0, 1).double().log_softmax(-1)
        x = model.base_model.layers[0](model.base_model.embed(rows))
        y = model.base_model.layers[1](x).flatten(0, 1)
        coder = coders["layers.1"].eval()
        out = coder.reconstruct(y)

        def graft(replacement):
            h = model.base_model.layers[2](replacement.view(12, 10, 12))
            log_q = model.head(h)[:, :-1].flatten(0, 1).double().log_softmax(-1)
            ce = nn.functional.nll_loss(log_q, labels)
            return float(ce), float((clean.exp() * (clean - log_q)).sum(-1).mean())

        expected = {"grafted": graft(out), "zero": graft(0 * y), "mean": graft(y.mean(0).expand_as(y))}
        ce = float(nn.functional.nll_loss(clean, labels))
    assert result.tokens == 120
    assert_close(result.clean_ce, ce, rtol=1e-6, atol=0)
    for kind, (want_ce, want_kl) in expected.items():
        got = getattr(result, kind)["layers.1"]
        assert_close((got.ce, got.kl), (want_ce, want_kl), rtol=1e-4, atol=1e-6)
    want = (expected["zero"][0] - expected["grafted"][0]) / (expected["zero"][0] - ce)
    assert_close(result.recovered["layers.1"], want, rtol=1e-3, atol=1e-4)
    r = result.reconstruction["layers.1"]
    fvu = float((y - out).square().sum() / (y - y.mean(0)).square().sum())
    assert_close((r.fvu, r.explained_variance), (fvu, 1 - fvu), rtol=1e-5, atol=0)
    assert_close(r.cosine, float(torch.cosine_similarity(y, out).mean()), rtol=1e-5, atol=0)
    code = coder.encode(y)
    fired = torch.zeros(48).scatter_add(0, code.top_indices.flatten(), (code.top_acts > 0).flatten().float())
    assert_close(r.l0, float(fired.sum()) / 120)
    assert r.dead == float((fired == 0).float().mean())
    assert sum(r.density) == int((fired > 0).sum())
    assert len(r.density) == len(DENSITY_EDGES) - 1


def test_batches_do_not_change_the_result(tmp_path):
    model, coders = Tiny(), trained(tmp_path)
    one, many = (evaluate(model, coders, ROWS, batch_size=b) for b in (12, 2))
    for name in coders:
        assert_close(many.reconstruction[name].fvu, one.reconstruction[name].fvu, rtol=1e-6, atol=0)
        assert_close(many.grafted[name].kl, one.grafted[name].kl, rtol=1e-5, atol=1e-9)
    assert evaluate(model, coders, ROWS, batch_size=2, max_batches=3).tokens == 60


def test_excluded_positions_are_neither_judged_nor_replaced(tmp_path):
    model, coders = Tiny(), {"embed": trained(tmp_path)["layers.0"]}
    everything = list(range(30))
    spared = ROWS[0, 0].item()
    everything.remove(spared)
    result = evaluate(model, coders, ROWS, batch_size=12, exclude=everything)
    assert result.tokens == int((spared == ROWS).sum())
    with pytest.raises(DataError, match="every token is excluded"):
        evaluate(model, coders, ROWS, exclude=list(range(30)))


def test_loud_tokens_are_neither_judged_nor_replaced(tmp_path):
    model, coders = Tiny(), {"embed": trained(tmp_path)["layers.0"]}
    model.base_model.embed.weight.data[5] *= 1000
    quiet = evaluate(model, coders, ROWS, batch_size=12, max_norm_ratio=10)
    assert quiet.tokens == int((ROWS != 5).sum())
    same = evaluate(model, coders, ROWS, batch_size=12, exclude=[5])
    assert (quiet.reconstruction, quiet.grafted) == (same.reconstruction, same.grafted)


def test_a_module_that_takes_ids_is_judged_beside_a_transcoder(tmp_path):
    model = Tiny().double()
    linear = model.base_model.layers[1].down
    coder = SparseCoder(24, SaeConfig(k=48, num_latents=48, transcode=True, skip_connection=True), d_out=12).double()
    coder.W_skip.data, coder.b_dec.data = linear.weight.data.clone(), linear.bias.data.clone()
    both = {"layers.1.down": coder, "embed": identity()}
    result = evaluate(model, both, ROWS, batch_size=5)
    assert_close(result.together.kl, 0.0, rtol=0, atol=1e-12)
    assert list(top_contexts(model, both, ROWS, batch_size=5)) == list(both)
    with pytest.raises(HookpointError, match="embed is called with token ids"), grafted(model, {"embed": coder}):
        model(ROWS)


def test_hookpoints_that_are_not_there_are_named_with_close_ones():
    model, sae = Tiny(), identity().float()
    graft = lambda *a: grafted(*a[:2]).__enter__()  # noqa: E731
    for use in (evaluate, top_contexts, graft):
        with pytest.raises(HookpointError, match=r"no module 'layer.1'; did you mean layers.1"):
            use(model, {"layer.1": sae}, ROWS)
    with grafted(model, {"layers.1/seed0": sae}):
        assert_close(model(ROWS), Tiny()(ROWS))
    with pytest.raises(HookpointError, match=r"layers.1/seed0 and layers.1/seed1 would both replace"):
        graft(model, {"layers.1/seed0": sae, "layers.1/seed1": sae})
    assert not any(m._forward_hooks for m in model.modules())


def test_what_cannot_be_judged_is_refused():
    model, sae = Tiny(), {"layers.1": identity().float()}
    for use in (evaluate, top_contexts):
        for options in ({"batch_size": 0}, {"max_batches": 0}):
            with pytest.raises(ConfigError, match=f"{next(iter(options))}=0 must be at least 1"):
                use(model, sae, ROWS, **options)
    with pytest.raises(DataError, match="rows of one token have no next token"):
        evaluate(model, sae, ROWS[:, :1])
    assert evaluate(model, sae, ROWS[:5]).tokens == 50, "fewer rows than a batch"
    model.base_model.embed.weight.data[29] = torch.nan
    rows = ROWS % 29
    rows[6, 2] = 29
    for use in (evaluate, top_contexts):
        with pytest.raises(DataError, match=r"batch 1: layers.1 yields values that are not finite at its output"):
            use(model, sae, rows, batch_size=5)


def test_transcoders_are_grafted_from_their_modules_input():
    model = Tiny().double()
    linear = model.base_model.layers[1].down
    coder = SparseCoder(24, SaeConfig(k=48, num_latents=48, transcode=True, skip_connection=True), d_out=12).double()
    coder.W_skip.data, coder.b_dec.data = linear.weight.data.clone(), linear.bias.data.clone()
    result = evaluate(model, {"layers.1.down": coder}, ROWS)
    assert_close(result.grafted["layers.1.down"].kl, 0.0, rtol=0, atol=1e-12)
    with torch.no_grad(), grafted(model, {"layers.1.down": coder}):
        inside = model(ROWS)
    assert_close(inside, model(ROWS).detach())


def test_results_are_written_with_their_definitions(tmp_path):
    result = evaluate(Tiny(), {"layers.1/seed0": identity().float(), "layers.1/seed3": identity().float()}, ROWS)
    result.save(tmp_path / "eval.json")
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert saved["grafted"]["layers.1/seed3"]["kl"] < 1e-6
    assert "KL(clean ‖ grafted)" in saved["definitions"]
    assert result.table().row_count == 3
    headless = evaluate(Tiny().base_model, {"layers.1": identity().float()}, ROWS)
    assert headless.reconstruction["layers.1"].fvu < 1e-10
