"""Two processes over gloo collect what one collects: DDP with and without freezing, and FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcore import CapturePlan, GradientCollector

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def collected(model: nn.Module, x: Tensor, *, freeze: bool = True) -> Tensor:
    with GradientCollector(model, CapturePlan.for_model(model), freeze=freeze) as collector:
        model(x).square().sum().backward()
    return collector.rows


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, x = build(), torch.arange(12.0).reshape(4, 3) / 12
    mine = slice(2 * rank, 2 * rank + 2)
    alone = collected(model, x)[mine]
    wrapped = nn.parallel.DistributedDataParallel(model)
    for freeze in (True, False):
        torch.testing.assert_close(collected(wrapped, x[mine], freeze=freeze), alone, rtol=1e-5, atol=1e-6)
    sharded = build()
    mesh = init_device_mesh("cpu", (2,))
    for part in (sharded[0], sharded[2], sharded):
        fully_shard(part, mesh=mesh)
    torch.testing.assert_close(collected(sharded, x[mine]), alone, rtol=1e-5, atol=1e-6)
    dist.barrier()  # a rank that leaves early takes the other's connection with it
    dist.destroy_process_group()
    Path(folder, f"done{rank}").touch()


def test_two_processes_equal_one(tmp_path):
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    try:
        assert [each.wait(timeout=600) for each in ranks] == [0, 0]
    finally:
        for each in ranks:
            each.kill()
    assert all((tmp_path / f"done{rank}").exists() for rank in (0, 1))


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # threads that gloo leaves behind abort the interpreter's own teardown now and then
