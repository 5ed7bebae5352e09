"""Capture against its floor: tokens/s of three ways through the same batches, in one run, medians.

(a) transformers' own forward and backward with weight gradients and whole logits,
(b) the floor: frozen weights, graph rooted at the embedding output, fused loss head, nothing captured,
(c) capture: the same with every linear layer under a sketch, as `trace build` has it: two-sided, tensor, and spectral
    (fitted beforehand, with and without a sketch of the rest); under normalisers; and once with every layer that can be
    captured.

    uv run python benchmarks/capture.py
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial

from _setup import articles, assets, interleaved, pythia_14m


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--length", type=int, default=512, help="longest document in tokens")
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--budget", type=int, default=4096, help="padded tokens a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", action="store_true", help="also a row a token")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    import numpy as np
    import torch
    from tokenizers import Tokenizer

    from attribute.batching import plan_batches
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

    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_file(str(assets() / "tokenizers" / "gpt-neox-20b" / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids[: options.length] for text in articles(options.documents)]
    lengths = np.array([len(each) for each in ids])
    batches = []
    for rows in plan_batches(lengths, np.arange(len(ids)), options.budget):
        inputs = torch.zeros(len(rows), int(lengths[rows].max()), dtype=torch.long)
        labels = torch.full_like(inputs, -100)
        for place, row in enumerate(rows):
            inputs[place, : lengths[row]] = labels[place, : lengths[row]] = torch.tensor(ids[row])
        batches.append((inputs, labels))

    model = pythia_14m()
    base, head = model.base_model, model.get_output_embeddings()

    def sample() -> None:
        for inputs, labels in batches[:2]:
            per_example_loss(base(inputs, use_cache=False)[0], head.weight, labels).sum().backward()

    plan = CapturePlan.for_model(base, kinds=MATRICES, sketch=TwoSided(options.side))
    every = CapturePlan.for_model(base, sketch=TwoSided(options.side))
    plans = {f"two-sided {options.side**2}": plan, f"two-sided {options.side**2}, all": every}
    for floats in (256, 1024):
        plans[f"tensor {floats}"] = CapturePlan(plan.modules, TensorSketch(floats))
        plans[f"spectral {floats}"] = fit_spectral(base, plan, sample, floats=floats)
    shared = fit_spectral(base, plan, sample, floats=256, total=256 * len(plan.modules))
    plans["spectral 256 and the rest"] = with_residual(shared)
    for kind in ("adam", "adafactor"):
        moments = {each.path: torch.rand(each.out_features, each.in_features) + 0.1 for each in plan.modules}
        normalizer = Normalizer.of_moments(kind, moments)
        plans[f"two-sided {options.side**2}, {kind}"] = replace(plan, normalizer=normalizer)

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

    def capture(plan: CapturePlan, *, per_position: bool = False) -> None:
        with GradientCollector(base, plan, per_position=per_position) as collector:
            for inputs, labels in batches:
                hidden = base(inputs, use_cache=False)[0]
                per_example_loss(hidden, head.weight, labels).sum().backward()
                collector.take()

    captures = {name: partial(capture, plan) for name, plan in plans.items()}
    if options.tokens:
        captures["a row a token"] = partial(capture, plan, per_position=True)
        plans["a row a token"] = plan
    seconds = interleaved({"plain": plain, "floor": floor, **captures}, options.repeats)
    rates = {name: round(float(lengths.sum()) / each) for name, each in seconds.items()}
    result = {
        "tokens": int(lengths.sum()),
        "threads": torch.get_num_threads(),
        "tokens_per_second": rates,
        "share of the floor": {name: round(seconds["floor"] / seconds[name], 3) for name in plans},
        "times plain": {name: round(seconds["plain"] / seconds[name], 2) for name in plans},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
