"""EK-FAC by kronfluence over the same rows and queries: run by its own Python, from ekfac_command.py.

    PEER_PYTHON benchmarks/ekfac_peer.py MODEL TRAIN.jsonl QUERIES.jsonl SCORES.npy FOLDER

Rows are ``{"input_ids": [...]}`` of one length. Every linear layer but the output embedding is tracked (HF ``Conv1D``
is replaced by ``nn.Linear`` first, which kronfluence needs), labels are sampled, damping is 0.1 of the mean eigenvalue.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


class NextToken(Task):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        labels = batch[:, 1:].flatten()
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self._names

    def get_attention_mask(self, batch):
        return torch.ones_like(batch)


def main() -> None:
    model_path, train, queries, target, folder = sys.argv[1:6]
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            model.set_submodule(name, linear)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    task = NextToken(names)
    model = prepare_model(model, task)
    sides = [
        torch.tensor([json.loads(line)["input_ids"] for line in Path(path).read_text(encoding="utf-8").splitlines()])
        for path in (train, queries)
    ]
    rows, asked = sides
    analyzer = Analyzer("peer", model, task, output_dir=folder, disable_tqdm=True, cpu=True)
    loaded = time.perf_counter()
    analyzer.fit_all_factors(
        "ekfac",
        dataset=rows,
        per_device_batch_size=64,
        factor_args=FactorArguments(strategy="ekfac"),
        overwrite_output_dir=True,
    )
    fitted = time.perf_counter()
    analyzer.compute_pairwise_scores(
        "scores",
        factors_name="ekfac",
        query_dataset=asked,
        train_dataset=rows,
        per_device_query_batch_size=20,
        per_device_train_batch_size=64,
        score_args=ScoreArguments(damping_factor=None),
        overwrite_output_dir=True,
    )
    scores = analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()
    np.save(target, scores)
    done = time.perf_counter()
    print(json.dumps({"load": loaded - began, "factors": fitted - loaded, "scores": done - fitted}))


if __name__ == "__main__":
    main()
