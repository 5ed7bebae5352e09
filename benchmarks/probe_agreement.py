"""Subject number in two real models: `python benchmarks/probe_agreement.py [--layers 0 1]`.

Circuits for the number of the subject in every attention and MLP of llama-stories260k and gpt2-shakespeare: KNN through
the full readout and the circuit, what its ablation does to is/are and was/were and to other text, and what matched
random circuits do. The environment variable TRACE_ASSETS names the folder with the models and the sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "packages/probing/tests"))
from agreement import agreement, assets, continuation, encode, prefixes, text_losses

from probing import (
    CircuitConfig,
    CircuitProbe,
    CircuitProbeConfig,
    ProbeData,
    ResidualUpdateModelConfig,
    TrainPlan,
    evaluate,
    fit,
)

MODELS = {
    "llama-stories260k": (
        "llama-stories260k",
        "model.layers.{}.self_attn.*_proj",
        "model.layers.{}.mlp.*_proj",
        "text/tinystories-0.9mb.txt",
    ),
    "gpt2-shakespeare": (
        "gpt2-shakespeare/run0",
        "transformer.h.{}.attn.c_*",
        "transformer.h.{}.mlp.c_*",
        "text/tinyshakespeare.txt",
    ),
}


def study(
    name: str, layers: list[int] | None = None, epochs: int = 60, controls: int = 20, l0_lambda: float = 1e-6
) -> list[dict]:
    """One row per layer and sub-block."""
    folder, attn, mlp, text = MODELS[name]
    model = AutoModelForCausalLM.from_pretrained(assets() / folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(assets() / folder)
    bos = name.startswith("llama")
    encoded = [encode(tokenizer, rows, bos) for rows in (prefixes(True, 1000), prefixes(False, 400))]
    (train_inputs, train_labels), (test_inputs, test_labels) = encoded
    train, test = ProbeData.at_last(train_inputs, train_labels), ProbeData.at_last(test_inputs, test_labels)
    words = ((" is", " are"), (" was", " were"))
    verbs = [tuple(continuation(tokenizer, form) for form in pair) for pair in words]
    running = tokenizer((assets() / text).read_text(encoding="utf-8")[-40_000:], add_special_tokens=False).input_ids
    chunks = torch.tensor(running[: 64 * 60]).view(-1, 64)
    whole = agreement(model, test_inputs, test_labels, verbs).mean(0)
    print(
        f"\n{name}: is/are {whole[0]:.3f}, was/were {whole[1]:.3f} right on {len(test_labels)} prefixes, unseen nouns"
    )
    print(
        "layer part  KNN full → circuit   kept   agreement without it [95 %]   random     p   text loss without, random"
    )
    found = []
    for layer in layers if layers is not None else range(model.config.num_hidden_layers):
        for part, pattern in (("attn", attn), ("mlp", mlp)):
            config = CircuitProbeConfig(
                f"{part}_update_{layer}",
                CircuitConfig(
                    mask_hparams={"mask_unit": "neuron"}, target_layers=[pattern.format(layer)], l0_lambda=l0_lambda
                ),
                ResidualUpdateModelConfig("auto", [layer], **{part: True}),
            )
            probe = CircuitProbe(config, model)
            with probe.circuit:
                fit(probe, train, TrainPlan(epochs=epochs))
                knn, masks = evaluate.evaluate_knn(probe, train, test), probe.circuit.masks()
            effects = [
                evaluate.ablation(model, masks, measure, controls=controls, pool="all")
                for measure in (
                    lambda m: agreement(m, test_inputs, test_labels, verbs).mean(1),
                    lambda m: text_losses(m, chunks),
                )
            ]
            verb, other = effects
            random_mean = None if verb.undefined else verb.full.mean - (verb.control_drop or 0.0)
            found.append(
                {
                    "model": name,
                    "layer": layer,
                    "part": part,
                    "knn_full": knn.full.mean,
                    "knn": knn.circuit.mean,
                    "chance": knn.chance,
                    "kept": masks.share,
                    "whole": verb.full.mean,
                    "ablated": verb.ablated.mean,
                    "random": random_mean,
                    "p": verb.p_value,
                    "text_rise": other.drop,
                    "text_rise_random": other.control_drop,
                }
            )
            row = found[-1]
            random = "   –      –" if verb.undefined else f"{row['random']:.3f}  {verb.p_value:.3f}"
            rise = "–" if other.undefined else f"{other.drop:+.3f}  {other.control_drop:+.3f}"
            print(
                f"{layer:5} {part:5} {knn.full.mean:.3f} → {knn.circuit.mean:.3f}     {masks.share:6.1%}   "
                f"{verb.ablated}         {random}   {rise}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--l0-lambda", type=float, default=1e-6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [row for name in options.models for row in study(name, options.layers, l0_lambda=options.l0_lambda)]
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
