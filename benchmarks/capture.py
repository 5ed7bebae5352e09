"""Capture against its floor: tokens/s and peak memory of several ways through the same batches, in one run, medians.

plain    transformers' own forward and backward with weight gradients and whole logits,
vmap     ``torch.func.vmap(grad)`` over the rows, the generic way to whole per-example gradients,
floor    frozen weights, graph rooted at the embedding output, fused loss head, nothing captured,
others   capture of every linear layer under a sketch, as ``trace build`` has it.

    uv run python benchmarks/capture.py [--shape pythia-14m] [--sides 16 64] [--methods two-sided …] [--memory]

With ``--memory`` every way also runs alone in a process of its own, whose peak less that of a process that only loads
model and texts is printed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from _setup import interleaved
from _shapes import SHAPES, model_of, token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pythia-14m")
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--length", type=int, default=512, help="longest document in tokens")
    parser.add_argument("--sides", type=int, nargs="+", default=[16])
    parser.add_argument("--budget", type=int, default=4096, help="padded tokens a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--methods", nargs="*", default=[], help="beginnings of the names of what to run; all by default"
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    batches, tokens = _batches(options)
    ways = _ways(options, batches)
    chosen = ("plain", "floor", *options.methods)
    names = [name for name in ways if not options.methods or name.startswith(chosen)]
    if options.only is not None:
        if options.only:
            ways[options.only]()()
        # ru_maxrss begins at what the parent had when it started this process; the high-water mark does not.
        status = Path("/proc/self/status").read_text()
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
        return
    actions = {name: ways[name]() for name in names}
    seconds = interleaved(actions, options.repeats)
    del actions
    print(f"{options.shape}: {tokens} tokens in {len(batches)} batches, {torch.get_num_threads()} threads")
    for name in names:
        row = f"{name:40s} {tokens / seconds[name]:9.0f} tokens/s  {seconds['floor'] / seconds[name]:5.2f} of the floor"
        print(f"{row}  {seconds['plain'] / seconds[name]:5.2f} x plain", flush=True)
    if options.memory:
        nothing = _peak("")
        for name in names:
            print(f"{name:40s} {(_peak(name) - nothing) / 1e6:6.2f} GB", flush=True)


def _batches(options: argparse.Namespace) -> tuple[list, int]:
    import numpy as np
    import torch

    from attribute.batching import plan_batches

    ids = token_ids(options.shape, options.documents, options.length)
    lengths = np.array([len(each) for each in ids])
    batches = []
    for rows in plan_batches(lengths, np.arange(len(ids)), options.budget):
        inputs = torch.zeros(len(rows), int(lengths[rows].max()), dtype=torch.long)
        labels = torch.full_like(inputs, -100)
        for place, row in enumerate(rows):
            inputs[place, : lengths[row]] = labels[place, : lengths[row]] = torch.tensor(ids[row])
        batches.append((inputs, labels))
    return batches, int(lengths.sum())


def _ways(options: argparse.Namespace, batches: list) -> dict[str, Callable[[], Callable[[], None]]]:
    """By name what makes each way: what is fitted is fitted when the way is asked for, and not timed."""
    import torch

    from gradcore import (
        MATRICES,
        CapturePlan,
        GradientCollector,
        Normalizer,
        TensorSketch,
        TwoSided,
        fit_spectral,
        per_example_loss,
        with_residual,
    )

    model = model_of(options.shape)
    base, head = model.base_model, model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    linear = CapturePlan.for_model(base, kinds=MATRICES)

    def losses(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return per_example_loss(base(inputs, use_cache=False)[0], head.weight, labels)

    def sample() -> None:
        for inputs, labels in batches[:2]:
            losses(inputs, labels).sum().backward()

    def plain() -> None:
        for inputs, labels in batches:
            model.zero_grad()
            model(inputs, labels=labels, use_cache=False).loss.backward()
        model.zero_grad()

    def floor() -> None:
        model.requires_grad_(False)
        for inputs, labels in batches:
            embedded = base.get_input_embeddings()(inputs).detach().requires_grad_()
            hidden = base(inputs_embeds=embedded, use_cache=False)[0]
            per_example_loss(hidden, head.weight, labels).sum().backward()
        model.requires_grad_(True)

    def vmap() -> None:
        wanted = {f"{each.path}.weight" for each in linear.modules}
        prefix = next(key for key, module in model.named_modules() if module is base)
        known = {key: each.detach() for key, each in model.named_parameters()}
        some = {key: each for key, each in known.items() if key.removeprefix(f"{prefix}.") in wanted}

        def loss(some: dict, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = torch.func.functional_call(
                model, {**known, **some}, args=(ids[None],), kwargs={"use_cache": False, "attention_mask": None}
            ).logits
            return torch.nn.functional.cross_entropy(logits[0, :-1], targets[1:], reduction="sum", ignore_index=-100)

        each_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attention has no batching rule and runs row by row
            for inputs, labels in batches:
                each_row(some, inputs, labels)

    def capture(plan: CapturePlan, **how: bool) -> None:
        with GradientCollector(base, plan, outside={name: head}, **how) as collector:
            for inputs, labels in batches:
                losses(inputs, labels).sum().backward()
                collector.take()

    def normalized(plan: CapturePlan, kind: str) -> CapturePlan:
        moments = {each.path: torch.rand(each.out_features, each.in_features) + 0.1 for each in plan.modules}
        return replace(plan, normalizer=Normalizer.of_moments(kind, moments))

    ways: dict[str, Callable[[], Callable[[], None]]] = {
        "plain": lambda: plain,
        "vmap": lambda: vmap,
        "floor": lambda: floor,
    }
    plans: dict[str, Callable[[], CapturePlan]] = {}
    for side in options.sides:
        floats, two = side**2, replace(linear, sketch=TwoSided(side))
        every = {"sketch": TwoSided(side), "outside": {name: head}}
        plans |= {
            f"two-sided {floats}": lambda two=two: two,
            f"two-sided {floats}, all and head": lambda every=every: CapturePlan.for_model(base, **every),
            f"two-sided {floats}, adam": lambda two=two: normalized(two, "adam"),
            f"two-sided {floats}, adafactor": lambda two=two: normalized(two, "adafactor"),
            f"tensor {floats}": lambda floats=floats: replace(linear, sketch=TensorSketch(floats)),
            f"spectral {floats}": lambda floats=floats: fit_spectral(base, linear, sample, floats=floats),
            f"spectral {floats} and the rest": lambda floats=floats: with_residual(
                fit_spectral(base, linear, sample, floats=floats, total=floats * len(linear.modules))
            ),
        }
        ways[f"a row a token, two-sided {floats}"] = lambda two=two: partial(capture, two, per_position=True)
        ways[f"a row a token, two-sided {floats}, adam"] = lambda two=two: partial(
            capture, normalized(two, "adam"), per_position=True
        )
    return ways | {key: lambda plan=plan: partial(capture, plan()) for key, plan in plans.items()}


def _peak(name: str) -> float:
    """Peak resident kilobytes of a process that runs one way once."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", name], stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
