"""`trace build` or `trace trackstar` as a whole command, start-up included, beside Bergson's, same model and texts.

    uv run python benchmarks/build_command.py [--command trackstar] [--shape pythia-14m] [--bergson PATH_TO_ITS_PROGRAM]

Each is run on some of the documents and on all of them: the difference is what the tokens cost once a command has
started. Prints seconds, tokens a second, peak memory and ratios of one run, medians. Bergson is measured if its program
is given; install it in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _setup import assets
from _shapes import SHAPES, TRAINED, model_of, texts_of, tokenizer_file

CONTEXT = {"gpt2-shakespeare": 64, "llama-stories260k": 512}
_MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
if done.returncode:
    sys.exit(done.stderr[-2000:].decode())
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
"""


def measure(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, peak resident gigabytes and processor seconds of a command and its children."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], stdout=subprocess.PIPE, check=True)
    peak, processor = done.stdout.split()
    return time.perf_counter() - began, int(peak) / 1e6, float(processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bergson")
    parser.add_argument("--command", choices=("build", "trackstar"), default="build", help="trackstar: 20 queries")
    parser.add_argument("--shape", choices=SHAPES, default="pythia-14m")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=0, help="documents end to end, cut into rows of so many tokens")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="trace-benchmark-"))
    try:
        _write_model(options.shape, folder / "model")
        texts, counts = _texts(options)
        sizes = {"few": len(texts) // 4, "all": len(texts)}
        for name, size in sizes.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:size])
            (folder / f"{name}.jsonl").write_text(lines)
        (folder / "queries.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[::-1][:20]))
        trace = str(Path(sys.executable).with_name("trace"))
        programs = {"trace": trace} | ({"bergson": options.bergson} if options.bergson else {})
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for repeat in range(options.repeats):
            for program, path in programs.items():
                for size in sizes:
                    run = str(folder / f"{program}-{size}-{repeat}")
                    data = ["--projection_dim", "16", *_data(options.command, folder, size, options.chunk)]
                    if program == "bergson":  # which refuses budgets above the context, unless rows are chunks
                        most = 2048 if options.chunk else CONTEXT.get(options.shape, 1024)
                        data += ["--token_batch_size", str(min(2048, most))]
                    measured = measure([path, options.command, run, "--model", str(folder / "model"), *data])
                    found.setdefault((program, size), []).append(measured)
                    shutil.rmtree(run, ignore_errors=True)
        more = sum(counts) - sum(counts[: sizes["few"]])
        print(f"{options.shape}: {len(texts)} documents, {sum(counts):,} tokens, {os.cpu_count()} cores")
        rates = {}
        for program in programs:
            wall, peak, processor = (statistics.median(each) for each in zip(*found[program, "all"]))
            few = [statistics.median(each) for each in zip(*found[program, "few"])]
            rates[program] = (wall, more / (wall - few[0]), more / (processor - few[2]))
            print(
                f"{program:8s} {wall:6.1f} s, {peak:.2f} GB; once started {rates[program][1]:9,.0f} tokens/s, "
                f"{rates[program][2]:9,.0f} a second of processor time"
            )
        if options.bergson:
            ours, theirs = rates["trace"], rates["bergson"]
            print(
                f"times faster: whole command {theirs[0] / ours[0]:.2f}, once started {ours[1] / theirs[1]:.2f}, "
                f"by processor time {ours[2] / theirs[2]:.2f}"
            )
    finally:
        shutil.rmtree(folder)


def _data(command: str, folder: Path, size: str, chunk: int) -> list[str]:
    sides = {"": size} if command == "build" else {"data.": size, "query.": "queries"}
    words = []
    for prefix, name in sides.items():
        words += [f"--{prefix}dataset", str(folder / f"{name}.jsonl")]
        words += [f"--{prefix}chunk_length", str(chunk)] if chunk else [f"--{prefix}truncation"]
    return words


def _write_model(shape: str, folder: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model_of(shape).save_pretrained(folder)
    if shape in TRAINED:
        AutoTokenizer.from_pretrained(str(assets() / TRAINED[shape][0])).save_pretrained(folder)
        return
    PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file(shape),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=1024 if shape == "gpt2-small" else 2048,
    ).save_pretrained(folder)


def _texts(options: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Documents of at most ``length`` tokens, and how many each has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file(options.shape))
    length = min(options.length, CONTEXT.get(options.shape, 1024))
    encoded = [tokenizer.encode(text) for text in texts_of(options.shape, options.documents)]
    cut = [tokenizer.decode(each.ids[: length - 8]) for each in encoded]
    return cut, [min(len(each.ids), length - 8) for each in encoded]


if __name__ == "__main__":
    main()
