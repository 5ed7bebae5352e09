"""EK-FAC factors and scores as whole commands: `trace method ek-fac` beside kronfluence, on the same rows in one run.

    uv run python benchmarks/ekfac_command.py --peer PYTHON_WITH_KRONFLUENCE [--shape llama-stories260k] [--rows 2000]

Prints seconds, peak memory, and the Spearman correlation of both score tables, mean over queries. kronfluence goes into
an environment of its own: ``uv venv peers; VIRTUAL_ENV=peers uv pip install kronfluence==1.0.1 transformers torch``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from _setup import assets
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
    options = parser.parse_args()
    model = assets() / TRAINED[options.shape][0]
    folder = Path(tempfile.mkdtemp(prefix="trace-benchmark-"))
    try:
        _write(model, folder, options)
        sides = [str(folder / f"{side}.jsonl") for side in ("train", "queries")]
        trace = [str(Path(sys.executable).with_name("trace")), "method", options.method, str(folder / "run")]
        trace += ["--model", str(model), "--data.dataset", sides[0], "--query.dataset", sides[1], "--include-bias"]
        times = {"trace": measure(trace)}
        if options.peer:
            peer = [options.peer, str(Path(__file__).with_name("ekfac_peer.py")), str(model), *sides]
            times["kronfluence"] = measure([*peer, str(folder / "peer.npy"), str(folder / "peer")])
        print(f"{options.shape}: {options.rows} rows of {options.length} tokens, {options.queries} queries")
        for name, (seconds, peak, processor) in times.items():
            print(f"{name:12s} {seconds:7.1f} s  {processor:7.1f} s of processor time  {peak:5.2f} GB")
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


def _agreement(folder: Path) -> float:
    from attribute.evaluate._ranks import column_spearman
    from gradstore import ScoreStore

    theirs = np.load(folder / "peer.npy")
    store = ScoreStore.open(folder / "run")
    return float(column_spearman(store.block(0, store.store.rows), theirs.T).mean())


if __name__ == "__main__":
    main()
