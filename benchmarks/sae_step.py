"""The SAE step and the file formats beside eai-sparsify's and SAELens', in one run on this machine.

    python benchmarks/sae_step.py --peers VENV/bin/python [--threads 2] [--seconds 5] [--tokens 4096]

VENV holds eai-sparsify 1.3.3 and sae-lens 6.54; each competitor runs in its own process, in turn, with the same shapes
and threads. The floor is the encoder's product alone. Interleaved rounds, best of each: noise only ever adds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sparsify import Sae, SaeConfig, convert
from sparsify._optim import ScheduleFreeSign

SHAPES = [(64, 2048), (512, 8192), (576, 18432)]
PEERS = Path(__file__).with_name("sae_peers.py")


def ours(n: int, d: int, m: int, k: int, threads: int, seconds: float, optimizer: str) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    coder, x = Sae(d, SaeConfig(num_latents=m, k=k)), torch.randn(n, d)
    opt = (
        ScheduleFreeSign(coder.parameters())
        if optimizer == "signum"
        else torch.optim.Adam(coder.parameters(), fused=True)
    )

    def step() -> None:
        coder(x).fvu.backward()
        opt.step()
        opt.zero_grad()
        coder.after_step()

    return timed(step, seconds)


def floor(n: int, d: int, m: int, threads: int, seconds: float) -> float:
    torch.set_num_threads(threads)
    x, weight, bias = torch.randn(n, d), torch.randn(m, d), torch.randn(m)
    rows = max(1, min(n, (24 << 20) // (4 * m)))
    out = torch.empty(rows, m)

    def product() -> None:
        for s in range(0, n, rows):
            part = x[s : s + rows]
            torch.addmm(bias, part, weight.T, out=out[: len(part)])

    return timed(product, seconds)["best"]


def timed(step, seconds: float) -> dict[str, float]:
    step()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    times.sort()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"best": times[0], "median": times[len(times) // 2], "steps": len(times), "peak_gb": peak}


def child(*words: object) -> dict[str, float]:
    """Run part of this script in a process of its own, so that peak memory is its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", *map(str, words)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def peer(python: str, *words: object) -> str:
    done = subprocess.run([python, str(PEERS), *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    return done.stdout


def formats(python: str) -> None:
    """Ours loads theirs and theirs loads ours: indices equal, values to 1e-6 of the largest."""
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    for who in ("eai", "saelens"):
        with tempfile.TemporaryDirectory() as scratch:
            home = Path(scratch)
            torch.save(x, home / "x.pt")
            mine = Sae(24, SaeConfig(num_latents=300, k=6))
            for p in mine.parameters():
                p.data = torch.randn_like(p)
            convert.save({"ours": mine}, home, "sparsify" if who == "eai" else "saelens")
            peer(python, "write", who, home / "theirs", 24, 300, 6)
            for name in ("ours", "theirs"):
                loaded = convert.load(home / name).coder
                peer(python, "codes", who, home / name, home / "x.pt", home / "out.pt")
                out = torch.load(home / "out.pt", weights_only=True)
                acts, indices, _ = loaded.encode(x)
                a = torch.zeros(64, 300).scatter(1, indices, acts.detach())
                b = torch.zeros(64, 300).scatter(1, out["indices"], out["acts"])
                equal = bool(((a > 0) == (b > 0)).all())
                worst = float((a - b).abs().max() / b.abs().max())
                far = float((loaded.reconstruct(x).detach() - out["y"]).abs().max() / out["y"].abs().max())
                print(f"{who:8} {name:7} active latents equal {equal}, values differ {worst:.1e}, outputs {far:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", type=lambda s: tuple(map(int, s.split("x"))), help="DxM; default: all")
    parser.add_argument("--part", nargs="*")
    args = parser.parse_args()
    if args.part:
        kind, n, d, m, k, threads, seconds = args.part[0], *map(int, args.part[1:])
        if kind == "floor":
            print(json.dumps({"best": floor(n, d, m, threads, seconds)}))
        else:
            print(json.dumps(ours(n, d, m, k, threads, seconds, kind)))
        return
    if args.peers:
        formats(args.peers)
    for d, m in args.shapes or SHAPES:
        shape = (args.tokens, d, m, 32, args.threads, args.seconds)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for name, kind in (("floor", "floor"), ("ours adam", "adam"), ("ours signum", "signum")):
                found.setdefault(name, []).append(child(kind, *shape))
            for name in ("eai", "saelens") if args.peers else ():
                found.setdefault(name, []).append(json.loads(peer(args.peers, "step", name, *shape).splitlines()[-1]))
        best = {name: min(r["best"] for r in results) for name, results in found.items()}
        print(f"D {d}, M {m}, k 32, {args.tokens} tokens a step, {args.threads} threads")
        for name, seconds in best.items():
            line = f"  {name:12} {seconds * 1e3:9.1f} ms  {args.tokens / seconds:10,.0f} tokens/s"
            line += f"  floor share {best['floor'] / seconds:.2f}"
            if name in ("eai", "saelens"):
                line += "".join(f"  {seconds / best[mine]:.2f}x {mine}" for mine in ("ours signum", "ours adam"))
            peak = [r["peak_gb"] for r in found[name] if "peak_gb" in r]
            print(line + (f"  peak {max(peak):.2f} GB" if peak else ""), flush=True)


if __name__ == "__main__":
    main()
