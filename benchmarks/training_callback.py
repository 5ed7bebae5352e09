"""What collecting gradients costs a training: the same training with and without the callback, in turns, medians.

uv run python benchmarks/training_callback.py [--width 128] [--layers 6] [--rows 256] [--tokens 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from attribute import GradientCollectorCallback, prepare_for_gradient_collection


def main() -> None:
    """Print seconds of either and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeats):
        for collecting in (False, True):
            seconds[collecting].append(_training(options, collecting))
    plain, ours = (statistics.median(seconds[each]) for each in (False, True))
    tokens = options.rows * options.tokens
    print(f"without {tokens / plain:10,.0f} tokens/s, with {tokens / ours:10,.0f}: {ours / plain - 1:+.1%}")


def _training(options: argparse.Namespace, collecting: bool) -> float:
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=options.vocabulary,
            n_positions=options.tokens,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    ids = torch.randint(0, options.vocabulary, (options.rows, options.tokens)).tolist()
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        callback = GradientCollectorCallback(Path(folder) / "run", projection_dim=options.side)
        arguments = hf.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            num_train_epochs=1,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = hf.Trainer(
            model=model, args=arguments, train_dataset=data, callbacks=[callback] if collecting else []
        )
        if collecting:
            trainer = prepare_for_gradient_collection(trainer)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
