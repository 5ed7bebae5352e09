"""EK-FAC factors and scores as whole commands: `trace method ek-fac` beside kronfluence, on the same rows in one run.

    uv run python benchmarks/ekfac_command.py --peer PYTHON_WITH_KRONFLUENCE [--shape llama-stories260k] [--rows 2000]

Prints seconds (medians of the repetitions, in turns), peak memory, and the Spearman correlation of both score tables,
mean over queries; and the floor: the arithmetic that EK-FAC needs whoever does it, at the rate of large matrix products
measured between the runs. kronfluence goes into an environment of its own: ``uv venv peers; VIRTUAL_ENV=peers uv pip
install kronfluence==1.0.1 transformers torch``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from _setup import assets, interleaved
from _shapes import TRAINED
from build_command import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python that has kronfluence")
    parser.add_argument("--shape", choices=sorted(TRAINED), default="llama-stories260k")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--method", default="ek-fac")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    model = assets() / TRAINED[options.shape][0]
    folder = Path(tempfile.mkdtemp(prefix="trace-benchmark-"))
    try:
        _write(model, folder, options)
        sides = [str(folder / f"{side}.jsonl") for side in ("train", "queries")]
        trace = [str(Path(sys.executable).with_name("trace")), "method", options.method, str(folder / "run")]
        trace += ["--model", str(model), "--data.dataset", sides[0], "--query.dataset", sides[1], "--include-bias"]
        commands = {"trace": trace}
        if options.peer:
            peer = [options.peer, str(Path(__file__).with_name("ekfac_peer.py")), str(model), *sides]
            commands["kronfluence"] = [*peer, str(folder / "peer.npy"), str(folder / "peer")]
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        rates = []
        for _ in range(options.repeats):
            shutil.rmtree(folder / "run", ignore_errors=True)
            for name, command in commands.items():
                runs[name].append(measure(command))
                rates.append(_rate())
        times = {name: [statistics.median(each) for each in zip(*found)] for name, found in runs.items()}
        print(f"{options.shape}: {options.rows} rows of {options.length} tokens, {options.queries} queries")
        for name, (seconds, peak, processor) in times.items():
            print(f"{name:12s} {seconds:7.1f} s  {processor:7.1f} s of processor time  {peak:5.2f} GB")
        work, rate = _arithmetic(model, options), statistics.median(rates)
        print(f"floor        {work / rate:7.1f} s: {work / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s")
        if options.peer:
            wall, processor = (times["kronfluence"][at] / times["trace"][at] for at in (0, 2))
            print(f"times faster {wall:7.2f}, by processor time {processor:.2f}")
            print(f"Spearman     {_agreement(folder):7.4f}")
    finally:
        shutil.rmtree(folder)


def _write(model: Path, folder: Path, options: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    text = (assets() / "text" / TRAINED[options.shape][1]).read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    pieces = [ids[at : at + options.length] for at in range(0, len(ids) - options.length, options.length)]
    order = np.random.default_rng(0).permutation(len(pieces))
    for side, chosen in (
        ("train", order[: options.rows]),
        ("queries", order[options.rows : options.rows + options.queries]),
    ):
        lines = (json.dumps({"input_ids": pieces[at]}) + "\n" for at in chosen)
        (folder / f"{side}.jsonl").write_text("".join(lines))


def _rate() -> float:
    """Operations a second of a product of 2,048 × 512 by 512 × 512, the size that tokens times a layer have here."""
    import torch

    tokens, layer = torch.randn(2048, 512), torch.randn(512, 512)
    seconds = interleaved({"product": lambda: [torch.mm(tokens, layer) for _ in range(20)]}, 9)["product"]
    return 20 * 2 * tokens.shape[0] * layer.numel() / seconds


def _arithmetic(model: Path, options: argparse.Namespace) -> float:
    """Operations in matrix products alone: three forward and backward passes that leave weight gradients out, the
    symmetric halves of both factors, tokens in the eigenbasis, rows' gradients twice (rotated, and for the queries)."""
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    loaded = AutoModelForCausalLM.from_pretrained(model)
    head = loaded.get_output_embeddings()
    tokens, total = options.rows * options.length, 3 * 4 * options.rows * options.length * head.weight.numel()
    for module in loaded.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            out, given = module.weight.shape
            factors, rotated = out * out + given * given, 2 * (out * out + given * given)
            total += tokens * (3 * 4 * out * given + factors + rotated + 2 * 2 * out * given)
            total += 2 * options.rows * options.queries * out * given
    return total


def _agreement(folder: Path) -> float:
    from attribute.evaluate._ranks import column_spearman
    from gradstore import ScoreStore

    theirs = np.load(folder / "peer.npy")
    store = ScoreStore.open(folder / "run")
    return float(column_spearman(store.block(0, store.store.rows), theirs.T).mean())


if __name__ == "__main__":
    main()
