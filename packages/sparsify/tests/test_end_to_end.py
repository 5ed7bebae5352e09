"""Training through the model: every loss counts there too, and excluded tokens are left to the model."""

from dataclasses import replace

import pytest
import torch
from small import Tiny, token_rows
from torch.testing import assert_close

from sparsify import DataError, HookpointError, Sae, SaeConfig, TrainConfig, Trainer

SAE = SaeConfig(k=4, num_latents=48)


def trainer(tmp_path, sae=SAE, rows=None, model=None, **changes):
    base = {"batch_size": 4, "hookpoints": ["layers.1"], "save_dir": str(tmp_path), "dead_feature_threshold": 64}
    cfg = TrainConfig(sae, **{**base, "loss_fn": "kl", **changes})
    return Trainer(cfg, token_rows() if rows is None else rows, model or Tiny())


def test_auxk_reaches_the_encoder_and_revives_dead_latents(tmp_path):
    silent = {}
    for alpha in (0.0, 1.0):
        run = trainer(tmp_path, auxk_alpha=alpha, lr=3e-3, rows=token_rows(256))
        run.saes["layers.1"].encoder.bias.data[:24] = -1.0
        run._initialise = lambda *_: None
        start = run.saes["layers.1"].encoder.weight.detach().clone()
        while run.global_step < run.total_steps:
            run.step()
        silent[alpha] = int((run.tokens_since_fired["layers.1"] > 640).sum())
        moved = (run.saes["layers.1"].encoder.weight.detach() - start).abs().amax(1) > 0
        assert (int(moved[:24].sum()) > 20) == (alpha > 0)
    assert silent[0.0] > 10
    assert silent[1.0] < silent[0.0] / 2


@pytest.mark.parametrize(
    ("sae", "key"),
    [
        (replace(SAE, multi_topk=True), "multi_topk_fvu/layers.1"),
        (replace(SAE, matryoshka=(12, 48)), "nested/layers.1"),
    ],
)
def test_other_losses_are_part_of_the_gradient(tmp_path, sae, key):
    run = trainer(tmp_path, sae, auxk_alpha=0.0)
    seen = {}
    run.optimiser.step = lambda _: seen.update({n: p.grad for n, p in run.saes["layers.1"].named_parameters()})
    run.step()
    assert run._averages()[key] > 0
    plain = trainer(tmp_path, auxk_alpha=0.0)
    bare = {}
    plain.optimiser.step = lambda _: bare.update({n: p.grad for n, p in plain.saes["layers.1"].named_parameters()})
    plain.step()
    assert (seen["W_dec"] - bare["W_dec"]).abs().max() > 1e-3


def test_jumprelu_is_held_to_its_sparsity(tmp_path):
    l0 = {}
    for coefficient in (0.0, 1.0):
        cfg = replace(SAE, activation="jumprelu", k=2)
        run = trainer(tmp_path, cfg, sparsity_coefficient=coefficient, lr=1e-2, rows=token_rows(256))
        while run.global_step < run.total_steps:
            run.step()
            run.meters.interval.clear() if run.global_step == run.total_steps - 8 else None
        l0[coefficient] = run._averages()["l0/layers.1"]
    assert abs(l0[1.0] - 2) < abs(l0[0.0] - 2) / 2


def test_batchtopk_learns_its_threshold(tmp_path):
    run = trainer(tmp_path, replace(SAE, activation="batchtopk"))
    run.fit()
    saved = Sae.load_from_disk(run.folder / "layers.1")
    assert saved.threshold > 0
    saved.encode(torch.randn(3, 12))


def test_the_best_coders_are_kept_by_the_models_loss(tmp_path):
    run = trainer(tmp_path, save_best=True, save_every=4, log_every=4)
    run.fit()
    assert Sae.load_from_disk(run.folder / "best" / "layers.1").num_latents == 48
    assert 0 < run.best["layers.1"] < float("inf")
    assert "fvu/layers.1" in run.averages


def test_excluded_tokens_reach_no_coder(tmp_path):
    """An embedding does not mix positions, so the code of other tokens is all that a coder may see."""
    kept = trainer(tmp_path, hookpoints=["embed"], exclude_tokens=[7, 11])
    seen = []
    coder = kept.saes["embed"]
    coder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    taken = kept.step()
    ids = token_rows()[:4]
    usual = ~torch.isin(ids, torch.tensor([7, 11]))
    assert taken == int(usual.sum())
    assert_close(seen[-1], kept.model.base_model.embed(ids)[usual].detach())


def test_broken_values_name_the_batch(tmp_path):
    rows, model = token_rows(), Tiny()
    rows[:8][rows[:8] == 29] = 0
    rows[8, 3] = 29
    model.base_model.embed.weight.data[29] = torch.nan
    run = trainer(tmp_path, rows=rows, model=model)
    run.step()
    run.step()
    with pytest.raises(DataError, match=r"batch 2: layers.1 yields values that are not finite"):
        run.step()
    with pytest.raises(DataError, match=r"every token is excluded"):
        trainer(tmp_path, exclude_tokens=list(range(30))).step()


def test_a_module_of_another_shape_is_refused(tmp_path):
    class Pooling(Tiny):
        def __init__(self):
            super().__init__()
            self.base_model.pool = torch.nn.AdaptiveAvgPool2d((1, 12))
            inner = self.base_model.forward
            self.base_model.forward = lambda ids: inner(ids) + self.base_model.pool(inner(ids))

    with pytest.raises(HookpointError, match="one vector per token"):
        trainer(tmp_path, hookpoints=["pool"], model=Pooling()).step()
