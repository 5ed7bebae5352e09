"""A whole training run beside eai-sparsify's: same model, rows, order, latents and steps; FVU on rows neither has seen.

    python benchmarks/sae_train.py --peer VENV/bin/python --assets FOLDER [--steps 200] [--threads 2]

FOLDER holds llama-stories260k and text/tinystories-0.9mb.txt. Each run is a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch

BATCH, LENGTH = 32, 128


def train(who: str, optimizer: str, lr: float, model_folder: str, rows_file: str, out: str, threads: int) -> None:
    """Runs under either interpreter: `sparsify` is the peer's package there and ours here."""
    torch.set_num_threads(threads)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from sparsify import SaeConfig, TrainConfig, Trainer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = torch.load(rows_file, weights_only=True)
    data = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")
    shared = {"batch_size": BATCH, "layers": [2], "save_dir": out, "log_to_wandb": False, "optimizer": optimizer}
    cfg = TrainConfig(SaeConfig(k=32, num_latents=2048), **shared, lr=lr or None)
    start = time.perf_counter()
    trainer = Trainer(cfg, data, model if who == "ours" else model.base_model)
    trainer.fit()
    spent = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"tokens_per_second": rows.numel() / spent, "peak_gb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer")
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", nargs="*")
    args = parser.parse_args()
    if args.part:
        who, optimizer, lr, *places, threads = args.part
        train(who, optimizer, float(lr), *places, int(threads))
        return
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsify import Sae, evaluate
    from sparsify.data import chunk_and_tokenize, documents, token_rows

    model_folder = args.assets / "llama-stories260k"
    texts = list(documents(args.assets / "text" / "tinystories-0.9mb.txt"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = chunk_and_tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_seq_len=LENGTH)
    rows = token_rows(data, 0, len(data))
    held, rows = rows[-128:], rows[:-128]
    order = torch.cat([torch.randperm(len(rows), generator=torch.Generator().manual_seed(i)) for i in range(9)])
    rows = rows[order[: args.steps * BATCH]]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    runs = [("ours", "signum", 0), ("ours", "adam", 0), ("ours", "adam", 1e-2)]
    runs += [("eai", "signum", 0), ("eai", "adam", 0)] if args.peer else []
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(rows, f"{scratch}/rows.pt")
        for i, (who, optimizer, lr) in enumerate(runs):
            out = f"{scratch}/{i}"
            python = sys.executable if who == "ours" else args.peer
            words = [who, optimizer, lr, model_folder, f"{scratch}/rows.pt", out, args.threads]
            command = [python, __file__, "--part", *words]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            told = json.loads(done.stdout.splitlines()[-1])
            if who == "eai":  # it saves every 1,000 steps and at the end
                assert Path(out, "unnamed", "layers.2").exists()
            sae = Sae.load_from_disk(f"{out}/unnamed/layers.2")
            r = evaluate(model.base_model, {"layers.2": sae}, held).reconstruction["layers.2"]
            print(
                f"{who:5} {optimizer:7} lr {lr or 'default':8} {told['tokens_per_second']:9,.0f} tokens/s  peak "
                f"{told['peak_gb']:.2f} GB  held-out FVU {r.fvu:.4f}  never fired {r.dead:.1%}  L0 {r.l0:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
