"""A run: equal to its parts however it is cut, exact when resumed, and clear about what it cannot do."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from small import Tiny, token_rows
from torch.testing import assert_close

from sparsify import (
    CheckpointError,
    ConfigError,
    DataError,
    FormatError,
    HookpointError,
    Sae,
    SaeConfig,
    TrainConfig,
    Trainer,
    build_cache,
    evaluate,
)
from sparsify._source import OnTheFly

SAE = SaeConfig(k=4, num_latents=48)


def config(tmp_path, sae=SAE, **changes):
    base = {"batch_size": 4, "hookpoints": ["layers.1"], "save_dir": str(tmp_path), "dead_feature_threshold": 300}
    return TrainConfig(sae, **{**base, **changes})


def weights(trainer):
    return {f"{n}.{k}": v.clone() for n, c in trainer.saes.items() for k, v in c.state_dict().items()}


def run(cfg, rows=None, model=None, steps=None):
    trainer = Trainer(cfg, token_rows() if rows is None else rows, model or Tiny())
    if steps is None:
        trainer.fit()
    for _ in range(steps or 0):
        trainer.step()
    return trainer


def logged(trainer):
    return [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]


KINDS = {
    "adam": {},
    "signum": {"optimizer": "signum"},
    "muon": {"optimizer": "muon"},
    "schedule of k": {"k_decay_steps": 10, "sae": replace(SAE, k=3)},
    "two seeds": {"init_seeds": [0, 3], "save_best": True},
    "accumulated and mixed": {"grad_acc_steps": 2, "micro_acc_steps": 2, "buffer_batches": 3},
    "batchtopk": {"sae": replace(SAE, activation="batchtopk")},
    "jumprelu": {"sae": replace(SAE, activation="jumprelu")},
    "transcoder": {"sae": replace(SAE, transcode=True, skip_connection=True), "hookpoints": ["layers.*.up"]},
    "end to end": {"loss_fn": "kl"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, kind):
    cfg = config(tmp_path / "whole", **KINDS[kind], log_every=3)
    whole = run(cfg)

    # Killed between checkpoints: what happened after the last one is lost and must be repeated exactly.
    broken_cfg = replace(cfg, save_dir=str(tmp_path / "broken"), save_every=2)
    broken = Trainer(broken_cfg, token_rows(), Tiny())

    class Killed(Exception):
        pass

    original = broken.step

    def dying_step():
        if broken.global_step == 5:
            raise Killed
        return original()

    broken.step = dying_step
    with pytest.raises(Killed):
        broken.fit()
    resumed = Trainer(broken_cfg, token_rows(), Tiny())
    resumed.load_state()
    assert resumed.global_step == 4
    resumed.fit()

    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    for name in whole.saes:
        saved = [Sae.load_from_disk(trainer.folder / name).state_dict() for trainer in (whole, resumed)]
        for key in saved[0]:
            assert torch.equal(saved[0][key], saved[1][key])
    assert logged(whole) == logged(resumed)


def gradients_of_a_step(cfg):
    trainer, seen = Trainer(cfg, token_rows(), Tiny()), {}
    (coder,) = trainer.saes.values()
    trainer.optimiser.step = lambda _: seen.update({n: p.grad.clone() for n, p in coder.named_parameters()})
    trainer.step()
    return seen


@pytest.mark.parametrize("name", ["topk", "groupmax", "jumprelu", "gated"])
def test_cutting_a_batch_does_not_change_the_step(tmp_path, name):
    sae = replace(SAE, activation=name)
    whole = gradients_of_a_step(config(tmp_path, sae))
    chunks = gradients_of_a_step(config(tmp_path, sae, micro_acc_steps=3))
    for key, value in whole.items():
        assert value.any() or key == "r_mag"
        assert_close(chunks[key], value, rtol=1e-4, atol=1e-6)


def test_a_batch_that_latents_are_chosen_from_is_not_cut(tmp_path):
    with pytest.raises(ConfigError, match="use a smaller batch_size with grad_acc_steps"):
        Trainer(config(tmp_path, replace(SAE, activation="batchtopk"), micro_acc_steps=2), token_rows(), Tiny())


def test_accumulated_gradients_are_means_over_batches(tmp_path):
    """Two accumulated batches give the mean of their gradients, each over its own variance."""
    trainer = Trainer(config(tmp_path, grad_acc_steps=2), token_rows(), Tiny())
    seen = {}

    def keep(_step):
        seen.update({n: p.grad.clone() for n, p in trainer.saes["layers.1"].named_parameters()})

    trainer.optimiser.step = keep
    coder = trainer.saes["layers.1"]
    trainer.step()
    for p in coder.parameters():
        p.grad = None
    expected = [coder(trainer.source.batch(i)["layers.1"].x).fvu / 2 for i in range(2)]
    sum(expected).backward()
    for name, p in coder.named_parameters():
        assert_close(seen[name], p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("acc", [1, 2, 4])
def test_the_schedule_counts_optimiser_steps(tmp_path, acc):
    trainer = run(config(tmp_path, grad_acc_steps=acc, batch_size=1, k_decay_steps=16 // acc))
    assert trainer.total_steps == 64 // acc
    (group,) = trainer.optimiser.optimizers[0].param_groups
    peak = trainer.optimiser.peaks[0][0]
    warm = trainer.optimiser.warmup
    assert_close(group["lr"], peak / (trainer.total_steps - warm))
    assert trainer.get_current_k() == SAE.k
    trainer.global_step = 16 // acc - 1
    assert trainer.get_current_k() > SAE.k
    trainer.global_step = 0
    assert trainer.get_current_k() == 48


def test_excluded_tokens_change_nothing(tmp_path):
    rows = token_rows()
    other = rows.clone()
    # Layers mix positions, but embeddings don't: at "embed" an excluded token can only matter by being trained on.
    other[other == 7] = 11
    kept = run(config(tmp_path, hookpoints=["embed"], exclude_tokens=[7, 11]), rows)
    swapped = run(config(tmp_path, hookpoints=["embed"], exclude_tokens=[7, 11]), other)
    assert all(torch.equal(a, b) for a, b in zip(weights(kept).values(), weights(swapped).values()))
    assert kept.tokens_seen == int((~torch.isin(rows, torch.tensor([7, 11]))).sum())


def test_sink_tokens_can_be_left_out(tmp_path):
    model = Tiny()
    model.base_model.embed.weight.data[5] *= 1000
    trainer = Trainer(config(tmp_path, hookpoints=["embed"], max_norm_ratio=10), token_rows(), model)
    x = trainer.source.batch(0)["embed"].x
    assert len(x) == int((token_rows()[:4] != 5).sum())
    assert x.norm(dim=1).max() < 50


def test_the_buffer_mixes_batches_and_loses_none(tmp_path):
    plain = Trainer(config(tmp_path), token_rows(), Tiny()).source
    mixed = Trainer(config(tmp_path, buffer_batches=3), token_rows(), Tiny()).source
    ordered = torch.cat([plain.batch(i)["layers.1"].x for i in range(len(plain))])
    served = [mixed.batch(i)["layers.1"].x for i in range(len(mixed))]
    assert len(served) == 16
    assert not torch.equal(served[0], plain.batch(0)["layers.1"].x)
    assert torch.equal(torch.cat(served).sort(0).values, ordered.sort(0).values)
    assert torch.equal(mixed.batch(4)["layers.1"].x, served[4])


def test_dead_latents_are_counted_in_tokens_and_by_activation(tmp_path):
    trainer = Trainer(config(tmp_path), token_rows(), Tiny())
    coder = trainer.saes["layers.1"]
    trainer.step()
    fired_in_one = trainer.tokens_since_fired["layers.1"] == 0
    assert 0 < int(fired_in_one.sum()) < 48
    # Chosen without an activation is not fired.
    coder.encoder.bias.data -= 100
    trainer.step()
    assert (trainer.tokens_since_fired["layers.1"][fired_in_one] == 64).all()
    assert trainer.tokens_since_fired["layers.1"].max() == 128


def test_auxk_revives_dead_latents(tmp_path):
    silent = {}
    for alpha in (0.0, 1.0):
        trainer = Trainer(
            config(tmp_path, auxk_alpha=alpha, dead_feature_threshold=64, lr=3e-3), token_rows(256), Tiny()
        )
        trainer.saes["layers.1"].encoder.bias.data[:24] = -1.0
        trainer._initialise = lambda *_: None
        while trainer.global_step < trainer.total_steps:
            trainer.step()
        silent[alpha] = int((trainer.tokens_since_fired["layers.1"] > 640).sum())
    assert silent[0.0] > 10
    assert silent[1.0] < silent[0.0] / 2


@pytest.mark.parametrize("name", ["topk", "groupmax", "batchtopk", "jumprelu", "gated"])
def test_every_activation_recovers_a_planted_dictionary(name):
    """Sparse sums of 32 directions in 16 dimensions: each direction has a decoder row near it."""
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)

    class Planted:
        widths = {"x": (16, 16)}  # noqa: RUF012

        def __len__(self):
            return 1500

        def batch(self, index):
            g = torch.Generator().manual_seed(index)
            code = (torch.rand(512, 32, generator=g) < 2 / 32) * (1 + torch.rand(512, 32, generator=g))
            x = code @ true
            from sparsify._source import Pair

            return {"x": Pair(x, x)}

        def fingerprint(self):
            return "planted"

    k = 2 if name in ("batchtopk", "jumprelu", "gated") else 4
    cfg = TrainConfig(
        SaeConfig(activation=name, k=k, num_latents=64),
        lr=3e-3,
        dead_feature_threshold=50_000,
        **({"sparsity_coefficient": 0.1} if name in ("jumprelu", "gated") else {}),
    )
    trainer = Trainer(cfg, source=Planted())
    while trainer.global_step < trainer.total_steps:
        trainer.step()
    rows = torch.nn.functional.normalize(trainer.saes["x"].W_dec.detach(), dim=1)
    best = (true @ rows.T).max(1).values
    assert best.mean() > 0.9, best.mean()
    if name == "jumprelu":
        assert 1 < float(trainer._averages()["l0/x"]) < 4


def test_the_model_is_left_as_it_was(tmp_path):
    for loss, transcode in (("fvu", False), ("ce", False), ("ce", True)):
        model = Tiny().train()
        model.head.bias.requires_grad_(False)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        run(config(tmp_path, replace(SAE, transcode=transcode), loss_fn=loss), model=model)
        assert all(m.training for m in model.modules())
        assert not any(m._forward_hooks for m in model.modules())
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_end_to_end_training_lowers_the_models_loss(tmp_path, loss):
    cfg = config(
        tmp_path, loss_fn=loss, hookpoints=["layers.?"], lr=3e-3, log_every=8, sae=replace(SAE, transcode=loss == "ce")
    )
    counting = (torch.arange(16) + torch.arange(256)[:, None]) % 30  # something that can be learned
    trainer = run(cfg, counting)
    lines = logged(trainer)
    assert list(trainer.saes) == ["layers.0", "layers.1", "layers.2"]
    assert lines[-1][loss] < lines[0][loss]


def test_finetuning_starts_from_the_files(tmp_path):
    first = run(config(tmp_path, run_name="first"))
    second = Trainer(config(tmp_path, finetune=str(first.folder)), token_rows(seed=1), Tiny())
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values()))
    second.step()
    drift = (second.saes["layers.1"].b_dec - first.saes["layers.1"].b_dec).abs().max()
    assert 0 < drift < 0.1
    with pytest.raises(FormatError, match=r"topk autoencoder 12 → 48 → 12, this run trains a topk autoencoder 12 → 96"):
        Trainer(config(tmp_path, SaeConfig(k=4, num_latents=96), finetune=str(first.folder)), token_rows(), Tiny())
    with pytest.raises(FormatError, match=r"no hookpoint 'layers.0'"):
        Trainer(config(tmp_path, hookpoints=["layers.0"], finetune=str(first.folder)), token_rows(), Tiny())
    alone = Trainer(config(tmp_path, finetune=str(first.folder / "layers.1")), token_rows(seed=1), Tiny())
    assert torch.equal(alone.saes["layers.1"].W_dec, first.saes["layers.1"].W_dec)
    for nowhere in ("no/such/dir/at/all", "./nosuch"):
        with pytest.raises(FormatError, match="neither a folder here nor to be had from the Hub"):
            Trainer(config(tmp_path, finetune=nowhere), token_rows(), Tiny())


def test_best_coders_and_intervals(tmp_path):
    trainer = run(config(tmp_path, save_best=True, save_every=4, log_every=4, run_name="r"))
    best = Sae.load_from_disk(tmp_path / "r" / "best" / "layers.1")
    assert best.num_latents == 48
    lines = logged(trainer)
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert lines[0]["tokens/layers.1"] == 4 * 4 * 16
    assert lines[0]["l0/layers.1"] <= 4
    assert trainer.best["layers.1"] < lines[0]["fvu/layers.1"]
    assert list(Sae.load_many(str(tmp_path / "r"), local=True)) == ["layers.1"]


def test_seeds_of_layers_whose_names_begin_alike(tmp_path):
    """EleutherAI/sparsify issue 136: coders of layers.1 were trained on the activations of layers.10 too."""
    both = run(config(tmp_path, hookpoints=["layers.1", "layers.10"], init_seeds=[0, 1]), model=Tiny(depth=11), steps=3)
    alone = run(config(tmp_path, hookpoints=["layers.1"], init_seeds=[0, 1]), model=Tiny(depth=11), steps=3)
    assert list(both.saes) == ["layers.1/seed0", "layers.1/seed1", "layers.10/seed0", "layers.10/seed1"]
    for name, value in weights(alone).items():
        assert torch.equal(weights(both)[name], value), name


def test_processes_take_equally_many_batches_and_share_none(tmp_path):
    """EleutherAI/sparsify issues 27, 68, 69: a process with a batch more than the others waits for ever."""
    rows = torch.arange(66)[:, None].expand(66, 5) % 30
    model = Tiny()
    parts = [OnTheFly(model, rows, ["layers.1"], transcode=False, batch_size=4, shard=(rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [5, 5, 5]
    taken = torch.cat([part.tokens(i) for i in range(5) for part in parts])
    assert torch.equal(taken, rows[:60])


def test_logged_fvu_is_the_mean_of_the_interval(tmp_path):
    trainer = Trainer(config(tmp_path), token_rows(), Tiny())
    seen = []
    for step in range(4):
        coder = trainer.saes["layers.1"]
        x = trainer.source.batch(step)["layers.1"].x
        if step == 0:
            coder.initialise(x, x)
        seen.append(float(coder(x, dead_mask=None).fvu.detach()))
        trainer.step()
    assert_close(trainer._averages()["fvu/layers.1"], sum(seen) / 4, rtol=1e-5, atol=1e-7)


def test_resuming_something_else_is_refused(tmp_path):
    run(config(tmp_path, run_name="a"))
    for change, message in [
        ({"lr": 0.5}, "lr=None, and is now resumed with lr=0.5"),
        ({"sae": replace(SAE, k=5)}, "k=4, and is now resumed with k=5"),
        ({"batch_size": 8}, "batch_size=4"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Trainer(config(tmp_path, run_name="a", **change), token_rows(), Tiny()).load_state()
    with pytest.raises(CheckpointError, match="data="):
        Trainer(config(tmp_path, run_name="a"), token_rows(seed=1), Tiny()).load_state()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        Trainer(config(tmp_path, run_name="b"), token_rows(), Tiny()).load_state()
    state = tmp_path / "a" / "training_state" / "step_16" / "rank_0.pt"
    for spoilt in (state.read_bytes()[:5000], b"garbage", b""):
        state.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match="cannot be read"):
            Trainer(config(tmp_path, run_name="a"), token_rows(), Tiny()).load_state()
    torch.save({"step": 3}, state)
    with pytest.raises(CheckpointError, match="does not hold the state of a run"):
        Trainer(config(tmp_path, run_name="a"), token_rows(), Tiny()).load_state()
    (state.parents[1] / "latest").write_text("7")
    with pytest.raises(CheckpointError, match="step_7, which holds no state"):
        Trainer(config(tmp_path, run_name="a"), token_rows(), Tiny()).load_state()


def test_a_half_written_line_is_cut_off_when_resuming(tmp_path):
    whole = run(config(tmp_path / "whole", log_every=1, save_every=4))
    broken = Trainer(config(tmp_path / "broken", log_every=1, save_every=4), token_rows(), Tiny())
    while broken.global_step < 4:
        broken.step()
    broken.save()
    lines = (whole.folder / "metrics.jsonl").read_text().splitlines()
    (broken.folder / "metrics.jsonl").write_text("\n".join(lines[:5]) + '\n{"step": 6, "fvu/lay')
    resumed = Trainer(config(tmp_path / "broken", log_every=1, save_every=4), token_rows(), Tiny())
    resumed.load_state()
    resumed.fit()
    assert [line["step"] for line in logged(resumed)] == list(range(1, 17))


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_a_trainer_ends_with_the_published_weights(tmp_path, optimizer):
    trainer = run(config(tmp_path, optimizer=optimizer, lr=1e-2))
    for _ in range(2):
        published = Sae.load_from_disk(trainer.folder / "layers.1").state_dict()
        for name, value in trainer.saes["layers.1"].state_dict().items():
            assert torch.equal(published[name], value), name
        before = trainer.state_dict()["coders"]["layers.1"]["W_dec"]
        assert torch.equal(before, trainer.saes["layers.1"].W_dec) == (optimizer == "adam")
        trainer.save()  # neither asking for the state nor saving again moves them
    resumed = Trainer(trainer.cfg, token_rows(), Tiny())
    resumed.load_state()
    assert torch.equal(resumed.saes["layers.1"].W_dec, before)
    coder = trainer.saes["layers.1"]
    del trainer  # nor does forgetting the trainer
    gc.collect()
    assert torch.equal(coder.W_dec, published["W_dec"])


class Rows(torch.nn.Module):
    """A module of real numbers, not of token ids."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(9, 12), torch.nn.Linear(12, 4)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("shape", [(64, 9), (64, 5, 9)])
def test_rows_of_real_numbers_are_given_to_the_module_as_they_are(tmp_path, shape):
    rows, model = torch.randn(shape), Rows()
    cfg = config(tmp_path, hookpoints=["up"], run_name="r")
    trainer = Trainer(cfg, rows, model)
    assert torch.equal(trainer.source.batch(1)["up"].y, model.up(rows[4:8]).detach().flatten(0, -2))
    trainer.fit()
    resumed = Trainer(cfg, rows, model)
    resumed.load_state()
    with pytest.raises(CheckpointError, match="data="):
        Trainer(cfg, rows + 1, model).load_state()
    assert evaluate(model, trainer.saes, rows).tokens == rows.shape[:-1].numel()
    cached = build_cache(tmp_path / "c", model, rows, ["up"], batch_size=4)
    assert torch.equal(cached.tokens(2), rows[8:12])
    assert len(build_cache(tmp_path / "c", model, rows, ["up"], batch_size=4)) == 16
    for change, message in [
        ({"exclude_tokens": [1]}, "the rows are not token ids, so exclude_tokens"),
        ({"loss_fn": "kl"}, "no next token to predict"),
    ]:
        with pytest.raises(DataError, match=message):
            run(replace(cfg, **change), rows, model)


def test_a_source_that_does_not_do_what_the_configuration_says_is_refused(tmp_path):
    cache = build_cache(tmp_path / "c", Tiny(), token_rows(), ["layers.[12]"], batch_size=4, pairs=True)
    good = config(tmp_path, hookpoints=["layers.[12]"])
    Trainer(good, source=cache.source())
    Trainer(replace(good, exclude_tokens=(3,)), source=cache.source_for(replace(good, exclude_tokens=(3,))))
    for change, message in [
        ({"batch_size": 8}, "batch_size=8, but the source was made with batch_size=4"),
        ({"hookpoints": ("layers.1",)}, r"hookpoints=\['layers.1'\]"),
        ({"exclude_tokens": (3,)}, r"exclude_tokens=\[3\], but the source was made with exclude_tokens=\[\]"),
        ({"max_norm_ratio": 9.0}, "max_norm_ratio=9.0"),
        ({"buffer_batches": 2}, "buffer_batches=2"),
        ({"sae": replace(SAE, transcode=True)}, "transcode=True"),
        ({"loss_fn": "kl"}, "runs the model"),
        ({"hookpoints": (), "layers": (1,)}, "no layer numbers"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Trainer(replace(good, **change), source=cache.source())
    with pytest.raises(HookpointError, match="matches no module"):
        Trainer(replace(good, hookpoints=("layers.9",)), source=cache.source())


def test_bad_input_is_named(tmp_path):
    model = Tiny()
    with pytest.raises(HookpointError, match=r"did you mean: layers.0.attn"):
        run(config(tmp_path, hookpoints=["layers.0.attnn"]), model=model)
    with pytest.raises(HookpointError, match="never calls unused"):
        run(config(tmp_path, hookpoints=["unused"]), model=model)
    with pytest.raises(HookpointError, match="layer 3 does not exist: layers has layers 0 to 2"):
        run(config(tmp_path, hookpoints=[], layers=[3]), model=model)
    with pytest.raises(ConfigError, match="k=90 is more than the 48 latents"):
        run(config(tmp_path, replace(SAE, k=90)), model=model)
    with pytest.raises(DataError, match="3 rows, fewer than one batch of 4"):
        run(config(tmp_path), token_rows(3), model=model)
    with pytest.raises(DataError, match=r"every token is excluded at layers.1"):
        run(config(tmp_path, exclude_tokens=list(range(30))), model=model)
    with pytest.raises(DataError, match=r"rows 0 to 4 have \[3, 4\] tokens"):
        run(config(tmp_path), [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3], [1, 2, 3]], model=model)
    with pytest.raises(DataError, match="yields one vector, which has no variance to explain: raise batch_size"):
        run(config(tmp_path, batch_size=1), token_rows(8, 1), model=model)
    with pytest.raises(DataError, match="rows of one token have no next token to predict"):
        run(config(tmp_path, loss_fn="ce"), token_rows(8, 1), model=model)
    rows = token_rows()
    rows[:8][rows[:8] == 29] = 0
    rows[8, 3] = 29
    model.base_model.embed.weight.data[29] = torch.nan
    with pytest.raises(DataError, match=r"batch 2: layers.1 yields values that are not finite"):
        run(config(tmp_path), rows, model=model)
