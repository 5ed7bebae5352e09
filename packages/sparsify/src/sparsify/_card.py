"""The model card of published coders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sparsify._coder import SparseCoder

BEGIN, END = "<!-- sparsify: begin -->", "<!-- sparsify: end -->"


def card(
    repo_id: str,
    coders: Mapping[str, SparseCoder],
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    license: str | None,
) -> str:
    """A README: header for the Hub, then what, how well, how made, how to use, in which tensors."""
    kind = "transcoder" if next(iter(coders.values())).cfg.transcode else "sparse-autoencoder"
    header: dict[str, Any] = {"library_name": "sparsify", "tags": [kind, "mechanistic-interpretability"]}
    header |= {"license": license} if license else {}
    header |= {"base_model": recipe["model"]} if "/" in str(recipe.get("model", "")) else {}
    header |= {"datasets": [recipe["dataset"]]} if "/" in str(recipe.get("dataset", "")) else {}
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        BEGIN,
        _what(coders, recipe),
        _table(coders, evaluation),
        _protocol(evaluation),
        _recipe(recipe),
        _usage(repo_id, coders),
        END,
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _what(coders: Mapping[str, SparseCoder], recipe: Mapping[str, Any]) -> str:
    kind = "transcoders" if next(iter(coders.values())).cfg.transcode else "sparse autoencoders"
    where = f" of `{recipe['model']}`" if recipe.get("model") else ""
    data = f" over `{recipe['dataset']}`" if recipe.get("dataset") else ""
    return f"{len(coders)} {kind} on the activations{where}{data}."


def _table(coders: Mapping[str, SparseCoder], evaluation: Mapping[str, Any]) -> str:
    judged, grafted = evaluation.get("reconstruction", {}), evaluation.get("grafted", {})
    recovered = evaluation.get("recovered", {})
    names = ["hookpoint", "activation", "inputs", "latents", "outputs", "k"]
    names += ["FVU", "L0", "dead"] if judged else []
    names += ["CE", "KL", "CE recovered"] if grafted else []
    lines = ["## Hookpoints", "", f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for hook, c in coders.items():
        row = [f"`{hook}`", c.cfg.activation, c.d_in, c.num_latents, c.d_out, c.cfg.k]
        if judged:
            r = judged.get(hook)
            row += [f"{r['fvu']:.4f}", f"{r['l0']:.1f}", f"{r['dead']:.1%}"] if r else ["", "", ""]
        if grafted:
            g = grafted.get(hook)
            row += [f"{g['ce']:.4f}", f"{g['kl']:.4f}", f"{recovered[hook]:.4f}"] if g else ["", "", ""]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def _protocol(evaluation: Mapping[str, Any]) -> str:
    if not evaluation:
        return ""
    clean = evaluation.get("clean_ce")
    first = f"Evaluated on {evaluation['tokens']:,} tokens"
    first += f"; the model's own CE is {clean:.4f}." if isinstance(clean, float) and clean == clean else "."
    return f"## Evaluation\n\n{first}\n\n- {evaluation['definitions']}"


def _recipe(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    told = {k: v for k, v in recipe.items() if v not in (None, [], "", False) and k not in ("sae", "run_name")}
    return f"## Training\n\n```yaml\n{yaml.safe_dump(dict(told), sort_keys=False)}```"


def _usage(repo_id: str, coders: Mapping[str, SparseCoder]) -> str:
    hook, c = next(iter(coders.items()))
    skip = ", `W_skip` (outputs, inputs)" if c.W_skip is not None else ""
    theirs = "" if c.cfg.activation not in ("topk", "groupmax") else " (EleutherAI's sparsify runs the same lines)"
    converted = f'convert.save({{"{hook}": sae}}, "saelens", "saelens")'
    return f"""## Use

With sparsify{theirs}:

```python
from sparsify import Sae

sae = Sae.load_from_hub("{repo_id}", hookpoint="{hook}")
acts, indices, _ = sae.encode(hidden)
```

For SAELens or dictionary_learning, convert first (what a layout cannot express exactly is refused):

```python
from sparsify import convert

{converted}
```

Each folder holds `cfg.json` and `sae.safetensors`: `encoder.weight` and `W_dec` (latents, width), `encoder.bias`,
`b_dec`{skip}."""
