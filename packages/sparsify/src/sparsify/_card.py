"""The model card of published coders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sparsify import convert
from sparsify._coder import SparseCoder
from sparsify.convert._sparsify import read_by_eleutherai

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
        _usage(repo_id, coders, recipe),
        END,
    ]
    return f"---\n{_yaml(header)}---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def _what(coders: Mapping[str, SparseCoder], recipe: Mapping[str, Any]) -> str:
    kind = "transcoder" if next(iter(coders.values())).cfg.transcode else "sparse autoencoder"
    kind = kind if len(coders) == 1 else f"{kind}s"
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
    told = {k: v for k, v in recipe.items() if k != "run_name" and v is not None and v != [] and v != ""}
    return f"## Training\n\n```yaml\n{_yaml(told)}```"


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _usage(repo_id: str, coders: Mapping[str, SparseCoder], recipe: Mapping[str, Any]) -> str:
    hook, c = next(iter(coders.items()))
    skip = ", `W_skip` (outputs, inputs)" if c.W_skip is not None else ""
    theirs = " (EleutherAI's sparsify runs the same lines)" if all(map(read_by_eleutherai, coders.values())) else ""
    return f"""## Use

With sparsify{theirs}:

```python
from sparsify import Sae

sae = Sae.load_from_hub("{repo_id}", hookpoint="{hook}")
acts, indices, _ = sae.encode(hidden)
```
{_elsewhere(repo_id, hook, coders, recipe)}
Each folder holds `cfg.json` and `sae.safetensors`: `encoder.weight` and `W_dec` (latents, width), `encoder.bias`,
`b_dec`{skip}."""


# How each library opens what `convert.save` wrote; {folder} holds the hookpoint shown.
_OPENED = {
    "saelens": """from sae_lens import SAE

sae = SAE.load_from_disk("{folder}")""",
    "dictionary_learning": """from dictionary_learning.utils import load_dictionary

sae, config = load_dictionary("{folder}", device="cpu")""",
    "circuit_tracer": "",
}
_NAMES = {"saelens": "SAELens", "dictionary_learning": "dictionary_learning", "circuit_tracer": "circuit-tracer"}


def _elsewhere(repo_id: str, hook: str, coders: Mapping[str, SparseCoder], recipe: Mapping[str, Any]) -> str:
    """A snippet for each library that can hold these coders, as `convert` judges."""
    # Hooks are named as circuit-tracer's own model names them, which nothing here can know.
    hooks = {"feature_input_hook": "...", "feature_output_hook": "..."}
    needed = {"circuit_tracer": {"model_name": str(recipe.get("model", "...")), **hooks}}
    shown = ""
    for layout, opened in _OPENED.items():
        metadata = needed.get(layout)
        if convert.refusal(coders, layout, metadata=metadata) is not None:
            continue
        told = f", metadata={metadata}" if metadata else ""
        lines = [f'convert.save(Sae.load_many("{repo_id}"), "{layout}", "{layout}"{told})', ""]
        if opened:
            lines += [opened.format(folder=f"{layout}/{hook}"), ""]
        shown += f"\nWith {_NAMES[layout]}, after converting:\n\n```python\nfrom sparsify import Sae, convert\n\n"
        shown += "\n".join(lines) + "```\n"
    return shown
