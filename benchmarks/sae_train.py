"""A whole training run beside eai-sparsify's and SAELens': same rows, order, latents and steps; FVU on rows held out.

    python benchmarks/sae_train.py [--eai VENV/bin/python] [--saelens VENV/bin/python] [--model stories|pythia-70m]
                                   [--steps 200] [--threads 2] [--repeats 1] [--only ours-adam-bf16 ...]

stories: llama-stories260k, layers.2, 2,048 latents, on TinyStories. pythia-70m: random weights in Pythia-70m's shape,
layers.3, 8,192 latents, on ids drawn by Zipf's law (its FVU says little, its speed much). Steps have 4,096 tokens.
Each run is a process of its own, in turn; processor time stands beside wall time, since it says more where
others work. SAELens is given activations by the transformers model stopped after the
hookpoint, as its own runner stops TransformerLens, at its default rate and at ten times it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch

BATCH, LENGTH = 32, 128


@dataclass(frozen=True)
class Setting:
    """What is trained on what."""

    layer: int
    latents: int


SETTINGS = {
    "stories": Setting(2, 2048),
    "pythia-70m": Setting(3, 8192),
}
RUNS = [
    ("ours", "signum", 0.0, "fp32"),
    ("ours", "adam", 0.0, "fp32"),
    ("ours", "adam", 1e-2, "fp32"),
    ("ours", "signum", 0.0, "bf16"),
    ("ours", "adam", 0.0, "bf16"),
    ("eai", "signum", 0.0, "fp32"),
    ("eai", "adam", 0.0, "fp32"),
    ("eai", "adam", 0.0, "bf16"),
    ("saelens", "adam", 3e-4, "fp32"),
    ("saelens", "adam", 3e-3, "fp32"),
]


def train(
    who: str, optimizer: str, lr: float, precision: str, setting: Setting, model_folder: str, rows_file: str, out: str
) -> None:
    """Runs under the interpreter of whom it measures: `sparsify` is the peer's package in eai's, ours in ours."""
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    rows = torch.load(rows_file, weights_only=True)
    fit = saelens_fit if who == "saelens" else sparsify_fit
    run = fit(who, model, rows, setting, optimizer, lr, precision, out)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start, busy = time.perf_counter(), time.process_time()
    run()
    spent, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told = {"tokens_per_second": rows.numel() / spent, "cpu_ms_per_kilotoken": busy * 1e6 / rows.numel()}
    print(json.dumps({**told, "peak_gb": peak, "training_gb": peak - before}))


def sparsify_fit(who, model, rows, setting, optimizer, lr, precision, out):
    from datasets import Dataset

    from sparsify import SaeConfig, TrainConfig, Trainer

    data = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")
    shared = {"batch_size": BATCH, "layers": [setting.layer], "save_dir": out, "log_to_wandb": False}
    if who == "ours":
        shared["precision"] = precision  # the choices, too; eai's coder stays in fp32 on a CPU
    cfg = TrainConfig(SaeConfig(k=32, num_latents=setting.latents), **shared, optimizer=optimizer, lr=lr or None)
    trainer = Trainer(cfg, data, model if who == "ours" else model.base_model)
    return trainer.fit


def saelens_fit(who, model, rows, setting, optimizer, lr, precision, out):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    class Stop(Exception):
        pass

    held = {}

    def hook(module, inputs, output):
        held["acts"] = output[0] if isinstance(output, tuple) else output
        raise Stop

    model.base_model.layers[setting.layer].register_forward_hook(hook)

    @torch.no_grad()
    def provider():
        for batch in rows.split(BATCH):
            try:
                model.base_model(batch)
            except Stop:
                yield held["acts"].flatten(0, 1)

    width = model.config.hidden_size
    shape = TopKTrainingSAEConfig(d_in=width, d_sae=setting.latents, k=32, device="cpu", dtype="float32")
    sae = TopKTrainingSAE(shape)
    cfg = SAETrainerConfig(
        total_training_samples=rows.numel(), train_batch_size_samples=BATCH * LENGTH, lr=lr, lr_end=lr
    )
    trainer = SAETrainer(cfg, sae, provider())

    def run():
        trainer.fit()
        sae.save_inference_model(out)

    return run


def stories(steps: int, folder: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The model's folder, its rows, shuffled anew each epoch, and rows held out."""
    from _setup import assets
    from datasets import Dataset
    from transformers import AutoTokenizer

    from sparsify.data import chunk_and_tokenize, documents, token_rows

    model = assets() / "llama-stories260k"
    texts = list(documents(assets() / "text" / "tinystories-0.9mb.txt"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = chunk_and_tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_seq_len=LENGTH)
    rows = token_rows(data, 0, len(data))
    held, rows = rows[-128:], rows[:-128]
    epochs = -(-steps * BATCH // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=torch.Generator().manual_seed(i)) for i in range(epochs)])
    return str(model), rows[order[: steps * BATCH]], held


def pythia_70m(steps: int, folder: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The same, made up."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50304, **shape)).save_pretrained(f"{folder}/model")
    frequency = 1 / torch.arange(1, 50305, dtype=torch.double)
    rows = torch.multinomial(frequency, (steps * BATCH + 64) * LENGTH, replacement=True).view(-1, LENGTH)
    return f"{folder}/model", rows[:-64], rows[-64:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eai")
    parser.add_argument("--saelens")
    parser.add_argument("--model", choices=SETTINGS, default="stories")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, in turn; medians are printed")
    parser.add_argument("--only", nargs="*", help="of the runs, as ours-adam-bf16")
    parser.add_argument("--part", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    setting = SETTINGS[args.model]
    if args.part:
        torch.set_num_threads(args.threads)
        who, optimizer, lr, precision, *places = args.part
        train(who, optimizer, float(lr), precision, setting, *places)
        return
    from transformers import AutoModelForCausalLM

    from sparsify import convert, evaluate

    pythons = {"ours": sys.executable, "eai": args.eai, "saelens": args.saelens}
    hook = f"layers.{setting.layer}"
    with tempfile.TemporaryDirectory() as scratch:
        prepare = stories if args.model == "stories" else pythia_70m
        folder, rows, held = prepare(args.steps, scratch)
        torch.save(rows, f"{scratch}/rows.pt")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        told: dict[tuple[str, str, float, str], list[dict[str, float]]] = {}
        runs = [
            run for run in RUNS if pythons[run[0]] and (not args.only or f"{run[0]}-{run[1]}-{run[3]}" in args.only)
        ]
        for turn in range(args.repeats):
            for i, run in enumerate(runs):
                out = f"{scratch}/{turn}-{i}"
                words = [
                    "--model",
                    args.model,
                    "--threads",
                    args.threads,
                    "--part",
                    *run,
                    folder,
                    f"{scratch}/rows.pt",
                    out,
                ]
                command = [str(word) for word in (pythons[run[0]], __file__, *words)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                told.setdefault(run, []).append(json.loads(done.stdout.splitlines()[-1]))
        for i, (who, optimizer, lr, precision) in enumerate(runs):
            out = Path(scratch, f"{args.repeats - 1}-{i}")
            place = out if who == "saelens" else out / "unnamed" / hook
            sae = convert.load(place).coder
            r = evaluate(model.base_model, {hook: sae}, held).reconstruction[hook]
            speed = statistics.median(each["tokens_per_second"] for each in told[runs[i]])
            busy = statistics.median(each["cpu_ms_per_kilotoken"] for each in told[runs[i]])
            peak, training = (max(each[key] for each in told[runs[i]]) for key in ("peak_gb", "training_gb"))
            print(
                f"{who:7} {optimizer:7} {precision} lr {lr or 'default':8} {speed:9,.0f} tokens/s  "
                f"processor {busy:.0f} ms per 1,000 tokens  "
                f"peak {peak:.2f} GB, training's share {training:.2f}  "
                f"held-out FVU {r.fvu:.4f}  never fired {r.dead:.1%}  L0 {r.l0:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
