"""What the peers do, run by their own interpreter: `sae_step.py` starts this and reads one JSON line per result.

{peer python} benchmarks/sae_peers.py step eai|saelens N D M k threads seconds
{peer python} benchmarks/sae_peers.py codes eai|saelens FOLDER VECTORS OUT
{peer python} benchmarks/sae_peers.py write eai|saelens FOLDER D M k
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch


def eai_coder(d, m, k):
    from sparsify import SparseCoder, SparseCoderConfig

    return SparseCoder(d, SparseCoderConfig(num_latents=m, k=k))


def eai_step(d, m, k):
    from schedulefree import ScheduleFreeWrapper

    from sparsify.sign_sgd import SignSGD

    coder = eai_coder(d, m, k)
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=1e-3), momentum=0.95)
    optimizer.train()

    def step(x):
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saelens_step(d, m, k):
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    coder = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=m, k=k, device="cpu", dtype="float32"))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
    dead = torch.zeros(m, dtype=torch.bool)

    def step(x):
        given = {"sae_in": x, "coefficients": {}, "dead_neuron_mask": dead, "n_training_steps": 0}
        names = getattr(TrainStepInput, "__dataclass_fields__", given)
        given |= {"is_logging_step": False}
        out = coder.training_forward_pass(TrainStepInput(**{n: v for n, v in given.items() if n in names}))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step, n, d, seconds):
    torch.manual_seed(0)
    x = torch.randn(n, d)
    step(x)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        step(x)
        times.append(time.perf_counter() - start)
    times.sort()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"best": times[0], "median": times[len(times) // 2], "steps": len(times), "peak_gb": peak}


def main():
    verb, who, *rest = sys.argv[1:]
    if verb == "step":
        n, d, m, k, threads, seconds = map(int, rest)
        torch.set_num_threads(threads)
        make = {"eai": eai_step, "saelens": saelens_step}[who]
        print(json.dumps(measure(make(d, m, k), n, d, seconds)))
    elif verb == "codes":
        folder, vectors, out = rest
        x = torch.load(vectors, weights_only=True)
        if who == "eai":
            from sparsify import Sae

            coder = Sae.load_from_disk(folder)
            acts, indices, _ = coder.encode(x)
            y = coder.decode(acts, indices)
        else:
            from sae_lens import SAE

            coder = SAE.load_from_disk(folder, device="cpu")
            f = coder.encode(x)
            acts, indices = f.topk(coder.cfg.k)
            y = coder.decode(f)
        torch.save({"acts": acts.detach(), "indices": indices, "y": y.detach()}, out)
    else:
        folder, d, m, k = rest[0], *map(int, rest[1:])
        torch.manual_seed(1)
        if who == "eai":
            coder = eai_coder(d, m, k)
            for p in coder.parameters():
                p.data = torch.randn_like(p)
            coder.save_to_disk(folder)
        else:
            from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

            coder = TopKSAE(TopKSAEConfig(d_in=d, d_sae=m, k=k, device="cpu", dtype="float32"))
            for p in coder.parameters():
                p.data = torch.randn_like(p)
            coder.save_model(folder)


main()
