"""Circuit probing, how fast and how right: `python benchmarks/probe.py [--modulus 59] [--epochs 400] [--experiment 2]`.

1. Experiment 1 of Lepori et al. 2024: per variable and sub-block the KNN accuracy of the full readout and of the
circuit,
   units kept, task accuracy after ablating the circuit, and seconds a probe. At modulus 113 the published figures stand
   beside ours: ``--modulus 113 --epochs 10000 --lr 1e-3 --decay 0.3 --probe-epochs 90``, an hour on one thread.
2. The same training step done plainly (whole model, masks multiplied into weight copies, pairwise losses) in the same
   run: the ratio is what caching is worth.
3. A step of an MLP probe at GPT-2-small shape, 500 probed rows.
4. With ``--neurosurgeon PYTHON``, an interpreter that has it (see `probe_peer.py`): the same probes on the same batches
   by NeuroSurgeon, in turns with ours (``--rounds``, medians).

One thread, processor time: other work on the machine does not count, though it slows memory down for all.
``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "packages/probing/tests"))
import modular

from probing import (
    CircuitConfig,
    CircuitProbe,
    CircuitProbeConfig,
    Masks,
    ProbeData,
    ResidualUpdateModelConfig,
    TrainPlan,
    evaluate,
    fit,
    fit_many,
)
from probing._losses import soft_nearest_neighbour
from probing._prefix import Prefix

# KNN full, KNN circuit, weights kept, accuracy after ablation: the published result files, modulus 113.
PUBLISHED = {
    ("attn", "a^2"): (0.660, 0.991, 34944, 0.008),
    ("attn", "-b^2"): (0.610, 0.991, 35072, 0.009),
    ("attn", "a+b"): (0.011, 0.008, 0, 1.000),
    ("attn", "a-b"): (0.010, 0.008, 0, 1.000),
    ("mlp", "a^2"): (0.103, 0.658, 85248, 0.057),
    ("mlp", "-b^2"): (0.087, 0.480, 83584, 0.086),
    ("mlp", "a+b"): (0.008, 0.008, 0, 1.000),
    ("mlp", "a-b"): (0.009, 0.008, 0, 1.000),
}


def new_probe(model, part: str, l0_lambda: float = 1e-6) -> CircuitProbe:
    circuit = CircuitConfig(
        "continuous_sparsification", {"mask_unit": "neuron"}, [f"transformer.h.0.{part}.c_*"], l0_lambda=l0_lambda
    )
    resid = ResidualUpdateModelConfig("gpt", [0], **{part: True})
    return CircuitProbe(CircuitProbeConfig(f"{part}_update_0", circuit, resid), model)


def plain_step(
    model, part: str, ids: torch.Tensor, labels: torch.Tensor, logits: dict[str, torch.Tensor]
) -> torch.Tensor:
    """One training loss done the obvious way; ``logits`` are the mask logits by module name."""
    seen = {}
    sub = model.transformer.h[0].attn if part == "attn" else model.transformer.h[0].mlp
    handle = sub.register_forward_hook(lambda m, a, y: seen.update(y=y[0] if isinstance(y, tuple) else y))
    weights = {n: model.get_submodule(n).weight * torch.sigmoid(s).repeat(model.get_submodule(n).weight.shape[0], 1)
               for n, s in logits.items()}  # fmt: skip
    torch.func.functional_call(model, {f"{n}.weight": w for n, w in weights.items()}, (ids,))
    handle.remove()
    v = seen["y"][:, -1]
    w = torch.exp(F.cosine_similarity(v[:, None], v[None], dim=-1) - 1) if len(v) < 64 else torch.exp(
        F.normalize(v) @ F.normalize(v).T - 1)  # fmt: skip
    same = torch.repeat_interleave(labels, len(labels)).eq(labels.repeat(len(labels))).view(len(labels), -1)
    other = ~torch.eye(len(labels), dtype=torch.bool)
    ratio = ((w * (same * other)).sum(1) + 1e-5) / ((w * other).sum(1) + 1e-5)
    penalty = sum((torch.sigmoid(s).repeat(model.get_submodule(n).weight.shape[0], 1)).sum() for n, s in logits.items())
    return -ratio.log().mean() + 1e-6 * penalty


def time_plain(model, part: str, data: ProbeData, steps: int = 8) -> float:
    """Seconds a plain training step takes."""
    names = [
        f"transformer.h.0.{part}.{leaf}" for leaf in (("c_attn", "c_proj") if part == "attn" else ("c_fc", "c_proj"))
    ]
    logits = {n: torch.zeros(1, model.get_submodule(n).weight.shape[1], requires_grad=True) for n in names}
    optimiser = torch.optim.AdamW(logits.values(), lr=1e-3)
    times = []
    for _ in range(steps):
        began = time.process_time()
        optimiser.zero_grad()
        plain_step(model, part, data.inputs["input_ids"][:500], data.labels[:500], logits).backward()
        optimiser.step()
        times.append(time.process_time() - began)
    return min(times)


def by_neurosurgeon(python: str, model, part: str, data: ProbeData, plan: TrainPlan, l0_lambda: float = 1e-6) -> dict:
    """The same probe by NeuroSurgeon, in a process of its own: the same batches, temperatures and penalty."""
    per_epoch = len(data) // plan.batch_size
    draw = torch.Generator().manual_seed(plan.seed)
    orders = [torch.randperm(len(data), generator=draw) for _ in range(plan.epochs)]
    rows = [batch for order in orders for batch in order.split(plan.batch_size)[:per_epoch]]
    leaves = ("c_attn", "c_proj") if part == "attn" else ("c_fc", "c_proj")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "model"))
        job = {
            "part": part, "paths": [f"transformer.h.0.{part}.{leaf}" for leaf in leaves], "l0_lambda": l0_lambda,
            "ids": data.inputs["input_ids"], "labels": data.labels, "rows": rows,
            "temperatures": [plan.temperature(step, len(rows)) for step in range(len(rows))],
        }  # fmt: skip
        torch.save(job, Path(folder, "job.pt"))
        quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        subprocess.run([python, str(Path(__file__).parent / "probe_peer.py"), folder], check=True, env=quiet)
        return torch.load(Path(folder, "result.pt"))


def timed_fit(model, part: str, data: ProbeData, plan: TrainPlan) -> tuple[CircuitProbe, list[float], float]:
    """A fresh probe trained, its losses, and seconds of processor time, caching included."""
    probe = new_probe(model, part)
    began = time.process_time()
    trace = fit(probe, data, plan)
    return probe, trace.loss, time.process_time() - began


def beside(
    python: str,
    model,
    part: str,
    data: tuple[ProbeData, ProbeData],
    plan: TrainPlan,
    task,
    masks_of_ours: Masks,
    rounds: int,
) -> dict:
    """What NeuroSurgeon found, judged as ours were, and how long both took, in turns."""
    ours, theirs = [], []
    for _ in range(rounds):
        _, losses, seconds = timed_fit(model, part, data[0], plan)
        found = by_neurosurgeon(python, model, part, data[0], plan)
        ours.append(seconds)
        theirs.append(found["seconds"])
    probe = new_probe(model, part)
    masks = Masks.of(model, found["kept"])
    for mask in probe.circuit.each():
        mask.logits.data = masks.keep[mask.site.path].float() - 0.5
    probe.eval()
    knn = evaluate.evaluate_knn(probe, *data)
    correct = evaluate.ablation(
        model, masks, lambda m: modular.correct(m, task, task.test), controls=0, scope="global"
    ).ablated.mean
    mine = masks_of_ours.keep
    same = sum(int((mine[path] == keep).sum()) for path, keep in masks.keep.items())
    units = sum(keep.numel() for keep in masks.keep.values())
    row = {
        "seconds": median(theirs), "ms_step": 1e3 * median(theirs) / len(losses), "seconds_ours": median(ours),
        "ratio": median(theirs) / median(ours), "knn_circuit": knn.circuit.mean, "ablated": correct,
        "same_units": same, "all_units": units,
        "loss_difference": max(abs(a - b) for a, b in zip(found["losses"], losses)),
    }  # fmt: skip
    print(
        f"      NeuroSurgeon {'':6} {row['knn_circuit']:8.3f} {same:4d} of {units} units as ours {row['ablated']:8.3f} "
        f"{row['seconds']:20.2f} {row['ms_step']:8.1f}: ours in {median(ours):.2f} s, {row['ratio']:.1f} × as fast"
    )
    return row


def experiment_one(
    modulus: int,
    epochs: int,
    lr: float,
    probe_epochs: int,
    decay: float = 0.0,
    peer: str | None = None,
    rounds: int = 1,
) -> dict:
    task = modular.disambiguation(modulus)
    began = time.perf_counter()
    model = modular.train(task, epochs, lr, decay=decay)
    base = modular.correct(model, task, task.test).mean().item()
    seconds = time.perf_counter() - began
    print(f"modulus {modulus}: base model {epochs} epochs in {seconds:.0f} s, test accuracy {base:.3f}")
    print("part  variable   KNN full  circuit   kept (weights)    ablated   controls   s/probe  ms/step   × plain")
    rows = []
    for part in ("attn", "mlp"):
        for variable, values in task.variables.items():
            train, test = (
                ProbeData.at_last({"input_ids": task.ids[rows_]}, values[rows_]) for rows_ in (task.train, task.test)
            )
            plan = TrainPlan(epochs=probe_epochs)
            probe, losses, seconds = timed_fit(model, part, train, plan)
            knn, masks = evaluate.evaluate_knn(probe, train, test), probe.circuit.masks()
            effect = evaluate.ablation(
                model, masks, lambda m: modular.correct(m, task, task.test), controls=5, scope="global"
            )
            step = seconds / len(losses)
            plain = time_plain(model, part, train)
            l0 = probe.circuit.compute_l0_statistics()
            rows.append(
                {
                    "part": part, "variable": variable, "knn_full": knn.full.mean, "knn_circuit": knn.circuit.mean,
                    "units": {path: int(mask.sum()) for path, mask in masks.keep.items()},
                    "weights": l0["total_l0"], "of": l0["max_l0"], "ablated": effect.ablated.mean,
                    "control_drop": effect.control_drop, "undefined": effect.undefined, "seconds": seconds,
                    "ms_step": 1e3 * step, "ratio_to_plain": plain / step,
                }
            )  # fmt: skip
            row = rows[-1]
            control = "undefined" if effect.undefined else f"{base - row['control_drop']:.3f}"
            print(
                f"{part:5} {variable:9} {knn.full.mean:9.3f} {knn.circuit.mean:8.3f} "
                f"{row['weights']:8d} of {row['of']:6d} {row['ablated']:9.3f}  {control:>9} "
                f"{seconds:9.2f} {1e3 * step:8.1f} {row['ratio_to_plain']:8.1f}"
            )
            if modulus == 113:
                full, circuit, kept, ablated = PUBLISHED[part, variable]
                print(f"      published {full:9.3f} {circuit:8.3f} {kept:8d} {'':9} {ablated:9.3f}")
            if peer:
                row["peer"] = beside(peer, model, part, (train, test), plan, task, masks, rounds)
        beside_ours = [row["peer"] for row in rows if row["part"] == part and "peer" in row]
        both = together(model, part, task, probe_epochs, rounds)
        rows.append(both)
        if beside_ours:
            ratios = [each["ratio"] for each in beside_ours]
            mean = sum(each["seconds"] for each in beside_ours) / len(beside_ours)
            print(
                f"{part:5} NeuroSurgeon's time over ours: {' '.join(f'{r:.1f}' for r in ratios)}, "
                f"median {median(ratios):.1f}; over ours together {mean / both['seconds']:.1f}"
            )
    return {"modulus": modulus, "epochs": epochs, "base_accuracy": base, "rows": rows}


def together(model, part: str, task, probe_epochs: int, rounds: int) -> dict:
    """The probes of all variables as one batch."""
    ids = {"input_ids": task.ids[task.train]}
    data = [ProbeData.at_last(ids, values[task.train]) for values in task.variables.values()]
    times = []
    for _ in range(rounds):
        probes = [new_probe(model, part) for _ in data]
        began = time.process_time()
        traces = fit_many(probes, data, TrainPlan(epochs=probe_epochs))
        times.append((time.process_time() - began) / len(probes))
    seconds = median(times)
    step = 1e3 * seconds / len(traces[0].loss)
    kept = " ".join(str(each.circuit.compute_l0_statistics()["total_l0"]) for each in probes)
    print(f"{part:5} all {len(probes)} together (fit_many), kept {kept:28} {'':18} {seconds:9.2f} {step:8.1f}")
    return {"part": part, "together": len(probes), "seconds": seconds, "ms_step": step}


def gpt2_small_step(rows: int = 500, positions: int = 15) -> dict:
    """An MLP probe of one GPT-2-small block: 500 rows of 15 tokens, one probed position each."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, vocab_size=1000, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    data = ProbeData.at_last({"input_ids": torch.randint(1000, (rows, positions))}, torch.randint(2, (rows,)))
    probe = new_probe(model, "mlp", 1e-7)
    probe.eval()
    prefix = Prefix(probe, data)
    probe.train()
    order, times = torch.arange(rows), []
    for _ in range(12):
        began = time.process_time()
        loss = soft_nearest_neighbour(prefix.vectors(order), data.labels) + 1e-7 * probe.circuit.l0_loss()
        loss.backward()
        times.append(time.process_time() - began)
    plain = time_plain(model, "mlp", data, steps=2)
    print(
        f"GPT-2-small MLP probe step, {rows} rows: {1e3 * min(times):.0f} ms; "
        f"plainly {plain:.2f} s ({plain / min(times):.0f}×)"
    )
    return {"ms_step": 1e3 * min(times), "plain_ms": 1e3 * plain}


def experiment_two(epochs: int, lr: float, modulus: int = 53, moduli: tuple[int, int, int] = (11, 13, 7)) -> dict:
    """Shared and free variables of two tasks, with the leak of the published data removed."""
    task = modular.shared_nodes(modulus, moduli)
    model = modular.train(task, epochs, lr)
    print(
        f"experiment 2, modulus {modulus}, {moduli}: test accuracy {modular.correct(model, task, task.test).mean():.3f}"
    )
    which = task.variables["task"]
    rows = []
    for own in (0, 1):
        train, test = (part[which[part] == own] for part in (task.train, task.test))
        other = task.test[which[task.test] == 1 - own]
        for variable in ("shared", "free 1", "free 2"):
            values = task.variables[variable]
            data = [ProbeData.at_last({"input_ids": task.ids[part]}, values[part]) for part in (train, test)]
            probe = new_probe(model, "attn")
            fit(probe, data[0], TrainPlan(epochs=60))
            knn, masks = evaluate.evaluate_knn(probe, *data), probe.circuit.masks()
            first = masks.keep["transformer.h.0.attn.c_attn"]
            only = {"transformer.h.0.attn.c_attn": first}
            without = evaluate.Ablated(model, Masks.of(model, only))
            same, diff = (modular.correct(without, task, part).mean().item() for part in (test, other))
            row = {"task": own + 1, "variable": variable, "knn_full": knn.full.mean, "knn": knn.circuit.mean}
            rows.append({**row, "chance": knn.chance, "c_attn": int(first.sum()), "same": same, "different": diff})
            print(
                f"task {own + 1} {variable:7} KNN {knn.full.mean:.3f} → {knn.circuit.mean:.3f} "
                f"(chance {knn.chance:.3f})  c_attn kept {int(first.sum()):3d}/384, "
                f"ablated: same task {same:.3f}, other {diff:.3f}"
            )
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modulus", type=int, default=59)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.0, help="share of the epochs over which the rate falls to 0")
    parser.add_argument("--probe-epochs", type=int, default=60)
    parser.add_argument("--experiment", type=int, choices=(1, 2), default=1)
    parser.add_argument("--neurosurgeon", metavar="PYTHON", help="interpreter that has NeuroSurgeon (probe_peer.py)")
    parser.add_argument("--rounds", type=int, default=1, help="of each probe beside NeuroSurgeon")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.experiment == 2:
        figures = experiment_two(options.epochs, options.lr)
    else:
        figures = experiment_one(
            options.modulus,
            options.epochs,
            options.lr,
            options.probe_epochs,
            options.decay,
            options.neurosurgeon,
            options.rounds,
        )
        figures["gpt2_small"] = gpt2_small_step()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
