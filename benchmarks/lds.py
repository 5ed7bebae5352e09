"""Linear datamodelling scores of the methods against exact retrainings, with bootstrap intervals.

    uv run python benchmarks/lds.py [--modules all|linear] [--projection-dim 16] [--methods ek-fac bm25 …]

Ground truth: ``lds-shakespeare`` among the assets (TRACE_ASSETS), 512 rows, 24 queries, 40 retrainings each with 5 %
and 50 % of the rows dropped. The score is Spearman over the retrainings between the summed scores of the dropped rows
and the rise of the query's loss, mean over queries; intervals resample the retrainings.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from attribute import IndexConfig
from attribute.data import Row, TokenFileWriter
from attribute.methods import Checkpoint, Study, estimators
from attribute.model import LanguageModel, load_model


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--modules", choices=("all", "linear"), default="all")
    parser.add_argument("--projection-dim", type=int, default=16)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--normalizer", default="", choices=("", "none", "adam", "adafactor", "shampoo"))
    parser.add_argument("--solver-rows", type=int, default=64)
    parser.add_argument("--solver-steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    root = Path(os.environ.get("TRACE_ASSETS", "../shared/assets")) / "lds-shakespeare"
    if not root.exists():
        raise SystemExit(f"no ground truth at {root}: set TRACE_ASSETS")
    model = load_model(str(root))
    with tempfile.TemporaryDirectory() as folder:
        study = _study(root, model, Path(folder), options)
        print(f"{'method':20s} {'5 % dropped':>22s} {'50 % dropped':>22s} {'seconds':>8s}")
        for name, estimator in estimators().items():
            if options.methods and name not in options.methods:
                continue
            began = time.perf_counter()
            scores = estimator.influence(study)
            seconds = time.perf_counter() - began
            cells = [_cell(*_lds(np.load(root / "losses.npz"), scores, share)) for share in ("05", "50")]
            print(f"{name:20s} {cells[0]:>22s} {cells[1]:>22s} {seconds:8.1f}", flush=True)


def _study(root: Path, model: LanguageModel, folder: Path, options: argparse.Namespace) -> Study:
    sides, texts = {}, {}
    for name in ("train", "queries"):
        lines = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        rows = [Row(np.array(each["input_ids"]), np.ones(len(each["input_ids"]), dtype=bool), {}) for each in lines]
        sides[name] = TokenFileWriter(folder / name, model.vocabulary).write(rows)
        texts[name] = [each["text"] for each in lines]
    everything = options.modules == "all"
    plan = model.plan(IndexConfig(projection_dim=0, modules=("*",) if everything else (), include_bias=everything))
    training = json.loads((root / "training.json").read_text())
    rate = float(np.mean(training["learning_rates"]))
    return Study(
        model,
        sides["train"],
        sides["queries"],
        plan,
        texts["train"],
        texts["queries"],
        checkpoints=(Checkpoint(_start(root), rate), Checkpoint(model, rate)),
        damping=options.damping,
        normalizer=options.normalizer,
        projection_dim=options.projection_dim,
        solver_rows=options.solver_rows,
        solver_steps=options.solver_steps,
        horizon=sum(training["learning_rates"]),
        batch=training["batch"],
    )


def _start(root: Path) -> LanguageModel:
    """The model before the training."""
    from safetensors.torch import load_file

    model = load_model(str(root))
    found = model.model.load_state_dict(load_file(root / "start.safetensors"), strict=False)
    assert not found.unexpected_keys, found
    return model


def _lds(truth: dict, scores: np.ndarray, share: str) -> tuple[float, float, float]:
    dropped = ~truth[f"kept_{share}"]
    predicted = dropped.astype(np.float64) @ scores.T.astype(np.float64)  # [subsets, queries]
    actual = truth[f"loss_{share}"] - truth["base"]
    generator = np.random.default_rng(0)
    picks = [generator.integers(0, len(actual), len(actual)) for _ in range(500)]
    means = [_mean_spearman(predicted[pick], actual[pick]) for pick in picks]
    return _mean_spearman(predicted, actual), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _mean_spearman(left: np.ndarray, right: np.ndarray) -> float:
    ranks = [np.apply_along_axis(_ranks, 0, side) for side in (left, right)]
    centred = [side - side.mean(0) for side in ranks]
    norms = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    return float(np.divide((centred[0] * centred[1]).sum(0), norms, out=np.zeros_like(norms), where=norms > 0).mean())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _cell(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
