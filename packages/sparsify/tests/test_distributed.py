"""Two gloo processes against one: the same coders, whether copied or shared out."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import Tiny, token_rows
from torch.testing import assert_close

from sparsify import ConfigError, Sae, SaeConfig, TrainConfig, Trainer, build_cache
from sparsify._parallel import Processes

HOOKS = ["layers.0", "layers.1"]
PROGRAM = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from small import Tiny, token_rows
from sparsify import TrainConfig, Trainer
from sparsify._parallel import joined
from sparsify.cli import sae
cache = sys.argv[2]
words = "train --num_latents 48 --k 4 --lr 1e-3 --dead_feature_threshold 200 --device cpu --run_name cached"
with joined():
    for text in sys.argv[3:]:
        cfg = TrainConfig.from_dict(json.loads(text))
        Trainer(cfg, token_rows(), Tiny()).fit()
        again = Trainer(cfg, token_rows(), Tiny())
        again.load_state()
        assert again.global_step == again.total_steps
    sae([*words.split(), "--cache", cache, "--save_dir", cache + "/.."], standalone_mode=False)
"""


def together(cache, *configs):
    """Run the same program in two processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    words = [
        sys.executable,
        "-c",
        PROGRAM,
        str(Path(__file__).parent),
        str(cache),
        *(json.dumps(c.to_dict()) for c in configs),
    ]
    shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            words, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:  # one that waits for a dead peer would outlive the tests
        for process in running:
            process.kill()
            process.communicate()


def config(tmp_path, name, **changes):
    base = {"hookpoints": HOOKS, "save_dir": str(tmp_path), "run_name": name, "dead_feature_threshold": 200}
    sae = SaeConfig(k=4, num_latents=48)
    # SGD-like comparability needs a smooth optimiser: sign descent would amplify rounding.
    return TrainConfig(sae, **{**base, "optimizer": "adam", "lr": 1e-3, **changes})


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    one = Trainer(config(tmp_path, "one", batch_size=8), token_rows(), Tiny())
    one.fit()
    modes = {"replicated": False, "shared out": True}
    build_cache(tmp_path / "acts", Tiny(), token_rows(), HOOKS, batch_size=4)
    together(
        tmp_path / "acts",
        *(config(tmp_path, name, batch_size=4, distribute_modules=mode) for name, mode in modes.items()),
    )
    cached = (tmp_path / "cached" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(cached[-1])["tokens/layers.0"] == 64 * 16, "each process reads its own share, both together all"
    for hook in HOOKS:  # the cache is in half precision
        a, b = (Sae.load_from_disk(tmp_path / n / hook).state_dict() for n in ("one", "cached"))
        assert all((a[k] - b[k]).norm() < 3e-2 * a[k].norm() for k in ("encoder.weight", "W_dec", "b_dec"))
    for run in modes:
        for hook in HOOKS:
            a = Sae.load_from_disk(tmp_path / "one" / hook).state_dict()
            b = Sae.load_from_disk(tmp_path / run / hook).state_dict()
            for name, value in a.items():
                assert_close(b[name], value, rtol=1e-4, atol=1e-5)
        logs = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("one", run)]
        assert set(logs[0]) == set(logs[1])
        for key, value in logs[0].items():
            assert_close(logs[1][key], value, rtol=1e-3, atol=2e-2 if key.startswith(("silent", "dead")) else 1e-4)
        # Counters of silence are global: both processes' firings reset them, both processes' tokens advance them.
        state = torch.load(tmp_path / run / "training_state" / "step_8" / "rank_0.pt", weights_only=True)
        mine = one.tokens_since_fired["layers.0"]
        assert (state["tokens_since_fired"]["layers.0"] == mine).float().mean() > 0.9


@pytest.mark.parametrize("name", ["gated", "jumprelu", "end to end"])
def test_every_loss_of_two_processes_is_that_of_one(tmp_path, name):
    changes = {"loss_fn": "kl"} if name == "end to end" else {}
    sae = SaeConfig(k=4, num_latents=48, **({} if changes else {"activation": name}))

    def of(run, **more):
        made = config(tmp_path, run, **changes, **more)
        return TrainConfig.from_dict({**made.to_dict(), "sae": sae, "save_every": 0})

    Trainer(of("one", batch_size=8), token_rows(), Tiny()).fit()
    build_cache(tmp_path / "acts", Tiny(), token_rows(), HOOKS, batch_size=4)
    together(tmp_path / "acts", of("two", batch_size=4))
    for hook in HOOKS:
        a, b = (Sae.load_from_disk(tmp_path / run / hook).state_dict() for run in ("one", "two"))
        for key, value in a.items():
            assert_close(b[key], value, rtol=1e-3, atol=2e-5)


def test_hookpoints_that_do_not_divide_are_refused():
    processes = Processes()
    processes.world = 2
    with pytest.raises(ConfigError, match="3 do not divide among 2 processes"):
        processes.owned(["a", "b", "c"])
    assert processes.owned(["a", "b", "c", "d"]) == ["a", "b"]
