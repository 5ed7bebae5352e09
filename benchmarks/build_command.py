"""`trace build` as a whole command, start-up included, beside `bergson build` on the same model, texts and sketch.

    uv run python benchmarks/build_command.py [--bergson PATH_TO_ITS_PROGRAM]

Prints wall seconds, peak memory and ratios of one run. Bergson is measured if its program is given; install it in an
environment of its own.
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

from _setup import articles, assets
from _shapes import model_of

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bergson")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="trace-benchmark-"))
    try:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(assets() / "tokenizers" / "gpt-neox-20b" / "tokenizer.json"),
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            model_max_length=2048,
        )
        model_of("pythia-14m").save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        texts = articles(options.documents)
        cut = [tokenizer.decode(tokenizer(text)["input_ids"][: options.length - 8]) for text in texts]
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in cut))
        tokens = sum(len(tokenizer(text)["input_ids"]) for text in cut)

        common = ["--model", str(folder / "model"), "--dataset", str(folder / "texts.jsonl"), "--truncation"]
        trace = str(Path(sys.executable).with_name("trace"))
        commands = {"trace": [trace, "build", "RUN", *common, "--projection_dim", "16"]}
        if options.bergson:
            commands["bergson"] = [options.bergson, "build", "RUN", *common, "--projection_dim", "16"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory: dict[str, list[float]] = {name: [] for name in commands}
        for repeat in range(options.repeats):
            for name, command in commands.items():
                run = str(folder / f"{name}-{repeat}")
                wall, peak, _ = measure([run if part == "RUN" else part for part in command])
                seconds[name].append(wall)
                memory[name].append(peak)
        result = {
            "tokens": tokens,
            "cores": os.cpu_count(),
            "seconds": {name: round(statistics.median(each), 1) for name, each in seconds.items()},
            "peak_gb": {name: round(max(each), 2) for name, each in memory.items()},
        }
        if options.bergson:
            result["times_faster"] = round(
                statistics.median(seconds["bergson"]) / statistics.median(seconds["trace"]), 2
            )
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
