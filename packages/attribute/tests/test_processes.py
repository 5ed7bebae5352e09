"""One, two and three processes, and more than there are rows: equal bytes in stores, equal sums."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from attribute import IndexConfig, ModelError
from attribute.curvature import Gram, Kronecker, load_curvature
from attribute.model import model_of
from attribute.processes import ALONE, Processes, current, joined
from gradstore import GradientStore

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

# One process loads what is needed and forks all the others; each job writes a folder.
HARNESS = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
import transformers.models.gpt2.modeling_gpt2, transformers.models.llama.modeling_llama
from attribute import DataConfig, IndexConfig, build_index
from attribute.curvature import fit_hessian, fit_preconditioners, trackstar
from attribute.processes import joined
from attribute.scoring import ReduceConfig, ScoreConfig, reduce_gradients, score_dataset

os.fsync = lambda _: None
root, given = Path(sys.argv[1]), json.loads(sys.argv[2])
data = DataConfig(dataset=given["data"])
plain = IndexConfig(model=given["gpt2"], projection_dim=4, rows_per_shard=4, token_batch_size=96, data=data)
whole = replace(plain, projection_dim=0)
heads = replace(whole, model=given["llama"], modules=("*mlp.up_proj", "*norm", "lm_head"), projection_dim=3)

def jobs(at, world):
    yield lambda: build_index(at / "build", replace(plain, normalizer="adam"))
    yield lambda: build_index(at / "spectral", replace(plain, projection_dim=None, sketch_floats=32))
    yield lambda: build_index(at / "tokens", replace(plain, attribute_tokens=True, store_dtype="int8"))
    yield lambda: build_index(at / "few", replace(plain, data=replace(data, split="train[:2]")))
    yield lambda: reduce_gradients(at / "sum", ReduceConfig("sum", group_column="kind"), whole)
    yield lambda: reduce_gradients(at / "mean", ReduceConfig("mean", unit_normalize=True), plain)
    yield lambda: score_dataset(at / "score", ScoreConfig(str(root / "query")), replace(plain, projection_dim=None))
    yield lambda: fit_preconditioners(at / "gram", plain)
    yield lambda: fit_hessian(at / "ekfac", heads, "ekfac")
    yield lambda: fit_hessian(at / "tkfac", replace(heads, data=replace(data, split="train[:2]")), "tkfac")
    if world == 2:
        spread = {"fsdp": True}
        yield lambda: build_index(at / "fsdp", replace(plain, normalizer="adam", **spread))
        yield lambda: build_index(at / "fsdp-spectral", replace(plain, projection_dim=None, sketch_floats=32, **spread))
        by_kind, query = ReduceConfig("sum", group_column="kind"), ScoreConfig(str(root / "query"))
        yield lambda: reduce_gradients(at / "fsdp-sum", by_kind, replace(whole, **spread))
        yield lambda: score_dataset(at / "fsdp-score", query, replace(plain, projection_dim=None, **spread))
        yield lambda: fit_hessian(at / "fsdp-ekfac", replace(heads, **spread), "ekfac")
        yield lambda: fit_preconditioners(at / "fsdp-gram", replace(plain, **spread))
    yield lambda: trackstar(at / "trackstar", plain, replace(data, split="train[:5]"))

def work(world, rank):
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    if world == 2:  # as torchrun has it
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": given["port"]}
    else:
        os.environ["TRACE_RENDEZVOUS"] = f"file://{root}/meet{world}"
    with joined():
        for job in jobs(root / str(world), world):
            job()

def fork(world, rank):
    child = os.fork()
    if child == 0:
        try:
            work(world, rank)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(1)
    return child

reduce_gradients(root / "query", ReduceConfig("mean", group_column="kind"), whole)
for world in given["worlds"]:
    codes = [os.waitpid(child, 0)[1] for child in [fork(world, rank) for rank in range(world)]]
    if any(codes):
        sys.exit(1)
"""


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 1, 2 and 3 with what so many processes made."""
    import socket

    root = tmp_path_factory.mktemp("worlds")
    (root / "data.jsonl").write_text(
        "".join(json.dumps({"text": text, "kind": n % 2}) + "\n" for n, text in enumerate(documents))
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    given = {**{name: str(path) for name, path in folders.items()}, "data": str(root / "data.jsonl"), "port": port}
    given["worlds"] = [1, 2, 3]
    command = [sys.executable, "-c", HARNESS, str(root), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def contents(path: Path) -> dict[str, bytes]:
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "store", ["build", "spectral", "tokens", "few", "score", "trackstar/index", "trackstar/queries", "trackstar/scores"]
)
def test_stores_are_equal_to_the_byte(runs, store, world):
    one, many = contents(runs / "1" / store), contents(runs / str(world) / store)
    assert one.keys() == many.keys()
    assert [name for name in one if one[name] != many[name]] == []
    assert "manifest.json" in one


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("run", ["sum", "mean"])
def test_sums_are_equal(runs, run, world):
    one, many = (GradientStore.open(runs / str(each) / run) for each in (1, world))
    np.testing.assert_allclose(many.block(0, many.rows), one.block(0, one.rows), rtol=1e-6, atol=1e-9)
    assert [many.data(row) for row in range(many.rows)] == [one.data(row) for row in range(one.rows)]


@pytest.mark.parametrize("world", [2, 3])
def test_a_gram_is_equal(runs, world):
    one, many = (load_curvature(runs / str(each) / "gram") for each in (1, world))
    assert isinstance(one, Gram)
    assert isinstance(many, Gram)
    assert many.rows == one.rows
    for name in one.values:
        close(many.moment(name), one.moment(name))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("method", ["ekfac", "tkfac"])
def test_factors_and_eigenvalue_corrections_are_equal(runs, method, world):
    one, many = (load_curvature(runs / str(each) / method) for each in (1, world))
    assert isinstance(one, Kronecker)
    assert isinstance(many, Kronecker)
    assert many.rows == one.rows
    assert "lm_head" in one.modules
    for name, expected in one.modules.items():
        found = many.modules[name]
        close(torch.as_tensor(found.scale), torch.as_tensor(expected.scale))
        if expected.corrected is not None:
            close(found.corrected, expected.corrected)
        for side in ("out", "in"):
            if getattr(expected, f"{side}_values") is not None:
                close(factor(found, side), factor(expected, side))


def factor(module: Any, side: str) -> torch.Tensor:
    values, vectors = getattr(module, f"{side}_values"), getattr(module, f"{side}_vectors")
    return values if vectors is None else (vectors * values) @ vectors.T


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("store", ["build", "spectral", "score"])
def test_a_model_spread_over_processes_gives_the_same_rows(runs, store):
    name = {"build": "fsdp"}.get(store, f"fsdp-{store}")
    one, many = contents(runs / "1" / store), contents(runs / "2" / name)
    assert one.keys() == many.keys()
    # The manifest says --fsdp, and the journal is sealed by it.
    assert [name for name in one if one[name] != many[name]] == ["manifest.json"]


def test_a_model_spread_over_processes_gives_the_same_sums_and_curvature(runs):
    sums = [GradientStore.open(runs / where).block(0, 2) for where in ("1/sum", "2/fsdp-sum")]
    np.testing.assert_allclose(*sums, rtol=1e-6, atol=1e-9)
    one, many = (load_curvature(runs / where) for where in ("1/gram", "2/fsdp-gram"))
    assert isinstance(one, Gram)
    assert isinstance(many, Gram)
    for name in one.values:
        close(many.moment(name), one.moment(name))
    factors = [load_curvature(runs / where) for where in ("1/ekfac", "2/fsdp-ekfac")]
    assert "lm_head" in factors[0].modules
    for name, expected in factors[0].modules.items():
        if expected.corrected is not None:
            close(factors[1].modules[name].corrected, expected.corrected)


def test_one_process_has_nobody_to_spread_a_model_over(folders):
    with pytest.raises(ModelError, match="several processes: --nproc-per-node"):
        model_of(IndexConfig(model=str(folders["gpt2"]), fsdp=True))


def test_nothing_is_left_beside_the_runs(runs):
    assert {each.name for each in (runs / "3").iterdir()} == {each.name for each in (runs / "1").iterdir()}
    assert not list(runs.rglob("parts"))


def test_shares_are_whole_disjoint_and_even():
    costs = [7, 1, 1, 5, 3, 3, 2, 9]
    shares = [Processes(rank, 3).deal(costs) for rank in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(8))
    loads = [sum(costs[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= 2
    assert Processes(4, 9).deal([1, 1]) == []


def test_alone_every_operation_is_the_identity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as here:
        assert here == ALONE == current()
    tensor = torch.arange(3.0)
    assert here.sums([tensor, None]) == [tensor, None]
    assert (here.most(3), here.merged({"a": 1}), here.from_first(lambda: 5)) == (3, {"a": 1}, 5)
    assert here.deal([3, 1, 2]) == [0, 1, 2]
