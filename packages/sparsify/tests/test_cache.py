"""The cache: the activations a model would give, whole after any interruption, refused where it does not fit."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import Tiny, token_rows
from torch.testing import assert_close

from sparsify import (
    ActivationCache,
    CheckpointError,
    ConfigError,
    DataError,
    FormatError,
    SaeConfig,
    TrainConfig,
    Trainer,
    build_cache,
)
from sparsify._source import OnTheFly

HOOKS = ["layers.1", "layers.2.up"]


def build(folder, rows=None, **options):
    rows = token_rows() if rows is None else rows
    return build_cache(folder, Tiny(), rows, HOOKS, **{"batch_size": 4, "pairs": True, **options})


def test_it_holds_what_the_model_computes_in_half_precision(tmp_path):
    cache = build(tmp_path)
    live = OnTheFly(Tiny(), token_rows(), HOOKS, transcode=True, batch_size=4)
    read = cache.source(transcode=True)
    assert read.widths == live.widths == {"layers.1": (12, 12), "layers.2.up": (12, 24)}
    assert len(read) == len(live) == 16
    for index in (0, 15):
        assert torch.equal(read.tokens(index), live.tokens(index))
        for name, pair in live.batch(index).items():
            assert torch.equal(read.batch(index)[name].x, pair.x.bfloat16())
            assert torch.equal(read.batch(index)[name].y, pair.y.bfloat16())


def test_training_from_it_is_training(tmp_path):
    cache = build(tmp_path / "c")
    cfg = TrainConfig(SaeConfig(k=4, num_latents=48), batch_size=4, hookpoints=["layers.1"], save_dir=str(tmp_path))
    live, read = Trainer(cfg, token_rows(), Tiny()), Trainer(cfg, source=cache.source(hookpoints=["layers.1"]))
    for trainer in (live, read):
        while trainer.global_step < trainer.total_steps:
            trainer.step()
    fvu = [t._averages()["fvu/layers.1"] for t in (live, read)]
    assert_close(fvu[1], fvu[0], rtol=1e-2, atol=0)


def test_exclusion_and_mixing_are_decided_when_reading(tmp_path):
    cache = build(tmp_path)
    rows = token_rows()[:4]
    kept = cache.source(exclude=[3, 4]).batch(0)["layers.1"].x
    assert len(kept) == int((~torch.isin(rows, torch.tensor([3, 4]))).sum())
    mixed = cache.source(buffer_batches=4)
    served = torch.cat([mixed.batch(i)["layers.1"].x for i in range(4)])
    plain = torch.cat([cache.read("layers.1", i) for i in range(4)])
    assert not torch.equal(served, plain)
    assert torch.equal(served.float().sort(0).values, plain.float().sort(0).values)


def test_appending_continues_and_mismatches_are_refused(tmp_path):
    assert len(build(tmp_path, max_batches=3)) == 3
    stamp = (tmp_path / "layers.1" / "00000001.npy").stat().st_mtime_ns
    told = []
    assert len(build(tmp_path, progress=lambda *each: told.append(each))) == 16
    assert told == [("computing activations", done, 16) for done in range(3, 17)]
    assert (tmp_path / "layers.1" / "00000001.npy").stat().st_mtime_ns == stamp
    for change, message in [
        ({"batch_size": 8}, "first_batch=|batch_size=4"),
        ({"pairs": False}, "pairs=True, now pairs=False"),
        ({"rows": token_rows(seed=1)}, "first_batch="),
    ]:
        with pytest.raises(CheckpointError, match=message):
            build(tmp_path, **change)
    other = token_rows()
    other[9] = 1
    with pytest.raises(CheckpointError, match="batch 2 of other rows than the dataset's 8 to 11"):
        build(tmp_path, other)
    with pytest.raises(CheckpointError, match="model="):
        build_cache(tmp_path, Tiny(seed=1), token_rows(), HOOKS, batch_size=4, pairs=True)


def test_a_killed_build_loses_nothing_finished(tmp_path):
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small import Tiny, token_rows
from sparsify import build_cache
torch.set_num_threads(1)
build_cache({str(tmp_path / "k")!r}, Tiny(), token_rows(20000), {HOOKS!r}, batch_size=4, pairs=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not (tmp_path / "k" / "layers.1" / "00000005.npy").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    done = len(ActivationCache(tmp_path / "k"))
    assert 4 <= done < 5000
    resumed = build_cache(
        tmp_path / "k", Tiny(), token_rows(20000), HOOKS, batch_size=4, pairs=True, max_batches=done + 2
    )
    whole = build_cache(
        tmp_path / "w", Tiny(), token_rows(20000), HOOKS, batch_size=4, pairs=True, max_batches=done + 2
    )
    assert len(resumed) == done + 2
    for path in sorted((tmp_path / "w").rglob("*.npy")):
        assert path.read_bytes() == (tmp_path / "k" / path.relative_to(tmp_path / "w")).read_bytes()
    assert whole.bytes == sum(p.stat().st_size for p in (tmp_path / "w").rglob("*.npy"))


def test_broken_caches_are_named(tmp_path):
    with pytest.raises(FormatError, match=r"no manifest.json"):
        ActivationCache(tmp_path)
    cache = build(tmp_path / "c", pairs=False)
    with pytest.raises(DataError, match="pairs=True"):
        cache.source(transcode=True)
    with pytest.raises(DataError, match=r"does not hold 'layers.7', only layers.1"):
        cache.source(hookpoints=["layers.7"])
    victim = tmp_path / "c" / "layers.1" / "00000002.npy"
    data = victim.read_bytes()
    victim.write_bytes(data[:-1])
    with pytest.raises(FormatError, match="torn"):
        ActivationCache(tmp_path / "c")
    victim.unlink()
    with pytest.raises(FormatError, match="missing: build the cache again from the same rows"):
        ActivationCache(tmp_path / "c")
    victim.write_bytes(data[: len(data) // 2])  # torn, and so are the ids of another batch
    tokens = tmp_path / "c" / "tokens" / "00000007.npy"
    ids = tokens.read_bytes()
    tokens.write_bytes(ids[:90])
    assert len(build(tmp_path / "c", pairs=False)) == 16
    assert (victim.read_bytes(), tokens.read_bytes()) == (data, ids)


class Pooled(torch.nn.Module):
    """One vector a row, and a module that only some tokens reach."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert, self.out = torch.nn.Embedding(30, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 8)

    def forward(self, ids):
        self.expert(self.embed(ids)[ids > 14])
        return self.out(self.embed(ids).mean(1))


def test_modules_that_yield_other_than_a_vector_a_token(tmp_path):
    cache = build_cache(tmp_path / "p", Pooled(), token_rows(), ["out", "expert"], batch_size=4)
    assert cache.source().batch(3)["out"].y.shape == (4, 8)
    assert len(cache.source().batch(3)["expert"].y) == int((token_rows()[12:16] > 14).sum())


def test_values_that_are_not_finite_are_not_kept(tmp_path):
    model = Tiny()
    rows = token_rows()
    rows[:8][rows[:8] == 29] = 0
    rows[9, 0] = 29
    model.base_model.embed.weight.data[29] = torch.nan
    with pytest.raises(DataError, match=r"batch 2: layers.1 yields values that are not finite"):
        build_cache(tmp_path, model, rows, HOOKS, batch_size=4)
    assert len(ActivationCache(tmp_path)) == 2
    for options in ({"batch_size": 0}, {"max_batches": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            build_cache(tmp_path / "n", Tiny(), token_rows(), HOOKS, **options)
