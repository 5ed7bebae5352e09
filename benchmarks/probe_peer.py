"""A circuit probe trained by NeuroSurgeon, for `benchmarks/probe.py --neurosurgeon PYTHON`; run by that interpreter.

Its environment needs NeuroSurgeon with ``Probing/circuit_probe.py`` and ``CircuitProbeConfig``, which the release 0.1.0
lacks and the branch ``updated_circuit_probe`` of its repository has, and torchmetrics.

    python probe_peer.py FOLDER

``FOLDER`` holds a saved model (``model/``) and ``job.pt``: token ids, labels, the rows and temperature of each step, λ.
Seconds of processor time on one thread, losses and kept units go to ``result.pt``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from NeuroSurgeon.Models import CircuitConfig
from NeuroSurgeon.Probing.circuit_probe import CircuitProbe
from NeuroSurgeon.Probing.probe_configs import CircuitProbeConfig, ResidualUpdateModelConfig
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    job = torch.load(folder / "job.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    part, paths = job["part"], job["paths"]
    masks = {"ablation": "none", "mask_unit": "neuron", "mask_bias": False, "mask_init_value": 0.0}
    circuit = CircuitConfig("continuous_sparsification", masks, paths, True, True, job["l0_lambda"])
    resid = ResidualUpdateModelConfig("gpt", [0], mlp=part == "mlp", attn=part == "attn")
    probe = CircuitProbe(CircuitProbeConfig(f"{part}_update_0", circuit, resid), model)
    probe.train()
    logits = [p for p in probe.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(logits, lr=1e-3)
    ids, labels = job["ids"], job["labels"]
    last = torch.zeros(ids.shape, dtype=torch.bool)
    last[:, -1] = True
    began, losses = time.process_time(), []
    for rows, temperature in zip(job["rows"], job["temperatures"]):
        probe.wrapped_model.wrapped_model.temperature = temperature
        optimiser.zero_grad()
        loss = probe(input_ids=ids[rows], labels=labels[rows], token_mask=last[rows]).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    seconds = time.process_time() - began
    kept = {path: model.get_submodule(path).weight_mask_params.detach().flatten() > 0 for path in paths}
    torch.save({"seconds": seconds, "losses": losses, "kept": kept}, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
