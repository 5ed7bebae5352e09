"""What cached activations are worth: the same training from the model and from the cache, and what building it costs.

    python benchmarks/sae_cache.py [--steps 12] [--repeats 3] [--threads 2]

A GPT-NeoX of Pythia-160m's shape with random weights, layers.8, 2,048 latents, k 32, 2,048 tokens a step. Both
see the same rows in one order; their FVU differs only by the cache's bfloat16. Medians of interleaved repetitions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _setup import interleaved
from transformers import GPTNeoXConfig, GPTNeoXModel

from sparsify import SaeConfig, TrainConfig, Trainer, build_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = GPTNeoXModel(shape()).eval()
    rows = [{"input_ids": row} for row in torch.randint(50304, (args.steps * 16, 128))]
    with tempfile.TemporaryDirectory() as scratch:
        cfg = TrainConfig(
            SaeConfig(k=32, num_latents=2048), batch_size=16, hookpoints=["layers.8"], save_dir=scratch, run_name="r"
        )
        found: dict[str, float] = {}

        def from_model() -> None:
            trainer = Trainer(cfg, rows, model)
            trainer.fit()
            found["model"] = trainer.averages["fvu/layers.8"]

        def from_cache() -> None:
            trainer = Trainer(cfg, source=cache.source_for(cfg))
            trainer.fit()
            found["cache"] = trainer.averages["fvu/layers.8"]

        turn = iter(range(1000))

        def build() -> None:
            build_cache(f"{scratch}/cache{next(turn)}", model, rows, ["layers.8"], batch_size=16)

        cache = build_cache(f"{scratch}/kept", model, rows, ["layers.8"], batch_size=16)
        size = sum(path.stat().st_size for path in Path(scratch, "kept").rglob("*") if path.is_file())
        seconds = interleaved({"model": from_model, "cache": from_cache, "build": build}, args.repeats)
    tokens = args.steps * 16 * 128
    for name, each in seconds.items():
        fvu = f"  FVU {found[name]:.4f}" if name in found else f"  {size / tokens:,.0f} bytes a token"
        print(f"{name:6} {each:7.2f} s  {tokens / each:9,.0f} tokens/s{fvu}")
    print(f"a second run is {seconds['model'] / seconds['cache']:.1f} times as fast from the cache")


def shape() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )


if __name__ == "__main__":
    main()
