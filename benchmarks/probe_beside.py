"""The methods circuit probing is compared with, on the network whose algorithm is known.

`python benchmarks/probe_beside.py [--modulus 59] [--epochs 400] [--parts probes amnesic counterfactual das transfer
curve]`

Experiment 1 of Lepori et al. 2024 (a² − b² mod P, one layer): what linear and MLP probes read before and after the MLP,
what erasing a variable does (LEACE, fitted on training rows, scored on others), whether the answer follows
counterfactual vectors and interchanged subspaces (boundless DAS), how fast the network learns a variable alone when it
starts from itself and when from nothing, and how the circuit's accuracy falls with its size. One thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "packages/probing/tests"))
import modular
from transformers import GPT2LMHeadModel

from probing import (
    CircuitConfig,
    CircuitProbe,
    CircuitProbeConfig,
    ProbeData,
    ResidualUpdateModelConfig,
    TrainPlan,
    beside,
    evaluate,
    fit,
)

# Published, modulus 113 (Lepori et al. 2024's result files): linear and MLP probes at resid_mid and resid_post.
PROBES = {
    "a^2": (1.000, 0.062, 1.000, 0.551),
    "-b^2": (1.000, 0.066, 1.000, 0.658),
    "a+b": (0.000, 0.008, 0.007, 0.014),
    "a-b": (0.000, 0.008, 0.007, 0.014),
}
AMNESIC = {"a^2": (0.019, 1.000), "-b^2": (0.018, 1.000), "a+b": (0.354, 0.993), "a-b": (0.352, 0.994)}


class Study:
    """A trained network, its task, and the vectors of one readout by part."""

    def __init__(self, model: GPT2LMHeadModel, task: modular.Task, modulus: int) -> None:
        self.model, self.task, self.modulus = model, task, modulus
        self.last = torch.zeros(len(task.ids), task.ids.shape[1], dtype=torch.bool)
        self.last[:, -1] = True

    def data(self, variable: str, rows: Tensor) -> ProbeData:
        """Rows with a variable's values as labels."""
        return ProbeData.at_last({"input_ids": self.task.ids[rows]}, self.task.variables[variable][rows])

    def vectors(self, key: str, rows: Tensor) -> Tensor:
        """One readout at the last position, [rows, d]."""
        kind = "resid" if key.startswith("resid") else key.partition("_")[0]
        resid = ResidualUpdateModelConfig("gpt", [0], **{kind: True})
        reader = CircuitProbe(CircuitProbeConfig(key, CircuitConfig(), resid), self.model)
        found = evaluate.probed_vectors(reader, self.data("a^2", rows))
        reader.close()
        return found

    def answer(self, rows: Tensor, variable: str, value: Tensor) -> Tensor:
        """The right answers if a variable had other values: a² + (−b²) = (a + b)(a − b)."""
        v = {name: values[rows] for name, values in self.task.variables.items()}
        v[variable] = value
        total = v["a^2"] + v["-b^2"] if variable in ("a^2", "-b^2") else v["a+b"] * v["a-b"]
        return total % self.modulus

    @torch.no_grad()
    def patched(self, place: str, rows: Tensor, new: Tensor) -> Tensor:
        """Answers with other vectors at ``resid_mid_0`` or ``resid_out_0``."""
        if place == "resid_mid_0":  # written as the attention's update: the MLP and the stream see the same sum
            new, place = new - self.vectors("resid_in_0", rows), "attn_update_0"
        with beside.patched(self.model, place, self.last[rows], new) as changed:
            return changed(input_ids=self.task.ids[rows], use_cache=False).logits[:, -1].argmax(-1)


def probes(study: Study) -> dict:
    """Accuracy of linear and MLP probes at both places, published figures in brackets."""
    found = {}
    print("probe accuracy: linear resid_mid, resid_out; MLP resid_mid, resid_out (published, modulus 113)")
    for variable in study.task.variables:
        scores = []
        for hidden in (None, 256):
            for key in ("resid_mid_0", "resid_out_0"):
                x, y = (study.vectors(key, rows) for rows in (study.task.train, study.task.test))
                labels = study.task.variables[variable]
                probe = beside.train_vector_probe(
                    x, labels[study.task.train], hidden=hidden, classes=study.modulus, epochs=100
                )
                scores.append(probe.accuracy(y, labels[study.task.test]).mean)
        found[variable] = scores
        print(f"{variable:6}", *(f"{s:.3f} ({p:.3f})" for s, p in zip(scores, PROBES[variable])))
    return found


def amnesic(study: Study) -> dict:
    """Task accuracy after erasing a variable; the eraser has not seen the rows it is scored on."""
    found, task = {}, study.task
    print("test accuracy after LEACE at resid_mid, resid_out (published)")
    for variable in task.variables:
        scores = []
        for place in ("resid_mid_0", "resid_out_0"):
            eraser = beside.Eraser.fit(study.vectors(place, task.train), task.variables[variable][task.train])
            said = study.patched(place, task.test, eraser(study.vectors(place, task.test)))
            scores.append((said == task.answers[task.test]).float().mean().item())
        found[variable] = scores
        print(f"{variable:6}", *(f"{s:.3f} ({p:.3f})" for s, p in zip(scores, AMNESIC[variable])))
    return found


def counterfactual(study: Study) -> dict:
    """Vectors at resid_mid moved until a linear probe reads another value: does the answer follow?"""
    found, task = {}, study.task
    draw = torch.Generator().manual_seed(0)
    print("counterfactual vectors: probe moved, answer follows (published: 1.000, 0.008–0.019)")
    for variable in ("a^2", "-b^2"):
        labels = task.variables[variable]
        probe = beside.train_vector_probe(
            study.vectors("resid_mid_0", task.train), labels[task.train], classes=study.modulus
        )
        rows = task.test[:500]
        targets = labels[task.train[torch.randint(len(task.train), (len(rows),), generator=draw)]]
        moved, success = beside.counterfactual_vectors(probe, study.vectors("resid_mid_0", rows), targets)
        said = study.patched("resid_mid_0", rows, moved)
        changed = targets != labels[rows]
        follows = (said == study.answer(rows, variable, targets))[changed].float().mean().item()
        found[variable] = (success.float().mean().item(), follows)
        print(f"{variable:6} {found[variable][0]:.3f} {follows:.3f}")
    return found


def interchange(study: Study, epochs: int = 40) -> dict:
    """Interchange accuracy of a learnt subspace of each update, on pairs of test rows."""
    found, task = {}, study.task
    draw = torch.Generator().manual_seed(0)
    print("interchange accuracy at the attention's and the MLP's update (published: a² 0.98–0.99, 0.02; a+b 0.01–0.02)")
    for variable in ("a^2", "a+b"):
        scores = []
        for key in ("attn_update_0", "mlp_update_0"):
            pairs = []
            for rows, count in ((task.train, 2500), (task.test, 1000)):
                base, source = (rows[torch.randint(len(rows), (count,), generator=draw)] for _ in range(2))
                expected = study.answer(base, variable, task.variables[variable][source])
                inputs = ({"input_ids": task.ids[part]} for part in (base, source))
                pairs.append((study.last[:1].expand(count, -1), *inputs, expected))
            swap = beside.train_interchange(study.model, key, *pairs[0], epochs=epochs)
            scores.append(beside.interchange_accuracy(study.model, key, *pairs[1], swap).mean().item())
        found[variable] = scores
        print(f"{variable:6} {scores[0]:.3f} {scores[1]:.3f}")
    return found


def transfer(study: Study, lr: float, epochs: dict[str, int]) -> dict:
    """Epochs until 99 % of unseen rows are right for one variable alone, from the network and from none."""
    found = {}
    print(
        "epochs to 0.99 on the variable alone, from the network, from none (published: a² 4–5, 11–12; a+b 267, 61–67)"
    )
    for variable, most in epochs.items():
        task, reached = replace(study.task, answers=study.task.variables[variable]), []
        for start in (copy.deepcopy(study.model).requires_grad_(), None):
            curve: list[float] = []

            def after(epoch: int, model: GPT2LMHeadModel, task=task, curve=curve) -> bool:
                curve.append(modular.correct(model, task, task.test).mean().item())
                return curve[-1] >= 0.99

            modular.train(task, most, lr, start=start, after=after)
            reached.append({"epochs": len(curve) if curve[-1] >= 0.99 else None, "curve": curve})
        found[variable] = reached
        print(f"{variable:6}", *(each["epochs"] or f"not in {most} ({each['curve'][-1]:.3f})" for each in reached))
    return found


def curve(study: Study, targets: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)) -> dict:
    """Circuit KNN and the effect of ablation against the share of units pruned, a² in attention."""
    found, rows = [], study.task
    print("pruned   kept   KNN of the circuit   accuracy without it")
    train, test = (study.data("a^2", part) for part in (rows.train, rows.test))
    for target in targets:
        config = CircuitConfig(mask_hparams={"mask_unit": "neuron"}, target_layers=["transformer.h.0.attn.c_*"])
        probe = CircuitProbe(
            CircuitProbeConfig("attn_update_0", config, ResidualUpdateModelConfig("gpt", [0], attn=True)), study.model
        )
        fit(probe, train, TrainPlan(epochs=60, lr=3e-3, target_sparsity=target))
        knn, masks = evaluate.evaluate_knn(probe, train, test), probe.circuit.masks()
        probe.close()
        without = modular.correct(evaluate.Ablated(study.model, masks), rows, rows.test).mean().item()
        found.append({"pruned": target, "kept": masks.share, "knn": knn.circuit.mean, "ablated": without})
        print(f"{target:6.2f} {masks.share:6.2f} {knn.circuit!s:>22} {without:14.3f}")
    return {"full": knn.full.mean, "points": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modulus", type=int, default=59)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--base", type=Path, help="state dict of a base model to read, or to write if it is not there")
    names = ("probes", "amnesic", "counterfactual", "das", "transfer", "curve")
    parser.add_argument("--parts", nargs="*", choices=names, default=list(names))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = modular.disambiguation(options.modulus)
    if options.base and options.base.exists():
        model = modular.network(task).eval()
        model.load_state_dict(torch.load(options.base, weights_only=True))
    else:
        model = modular.train(task, options.epochs, options.lr, decay=options.decay)
        if options.base:
            torch.save(model.state_dict(), options.base)
    print(f"modulus {options.modulus}: test accuracy {modular.correct(model, task, task.test).mean():.3f}")
    study = Study(model, task, options.modulus)
    steps = {
        "probes": lambda: probes(study),
        "amnesic": lambda: amnesic(study),
        "counterfactual": lambda: counterfactual(study),
        "das": lambda: interchange(study),
        "transfer": lambda: transfer(study, 1e-3, {"a^2": 200, "a+b": 450}),
        "curve": lambda: curve(study),
    }
    figures = {name: steps[name]() for name in options.parts}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
