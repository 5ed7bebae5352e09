"""circuit-tracer's transcoder sets: ``config.yaml`` and ``layer_{i}.safetensors``, W_enc and W_dec both (M, D).

Its encoder subtracts nothing. Activations are ReLU, JumpReLU (where a threshold is stored) and a top-k without ReLU.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from natsort import natsorted
from safetensors.torch import save_file
from torch import Tensor

from sparsify._coder import SparseCoder
from sparsify._config import SaeConfig
from sparsify._errors import FormatError
from sparsify._files import read_tensors
from sparsify._hooks import hook_of
from sparsify.convert._foreign import Options, make, refuse

CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"


def matches(path: Path, options: Options) -> bool:
    """A folder with config.yaml and layer files."""
    del options
    return path.is_dir() and (path / CONFIG).exists() and any(path.glob("layer_*.safetensors"))


def load(path: Path, options: Options) -> dict[str, SparseCoder]:
    """Every layer's transcoder, as ``layer_{i}``."""
    del options
    values = yaml.safe_load((path / CONFIG).read_text())
    if values.get("model_kind", "transcoder_set") != "transcoder_set":
        raise FormatError(
            f"{path}: {values['model_kind']!r} writes to several layers at once, which no SparseCoder does"
        )
    if values.get("activation") == "topk":
        raise FormatError(
            f"{path}: circuit-tracer's top-k keeps negative pre-activations, a SparseCoder's does not; they agree only "
            "where k are positive"
        )
    coders: dict[str, SparseCoder] = {}
    for file in natsorted(path.glob("layer_*.safetensors")):
        t = read_tensors(file)
        names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_skip": "W_skip", THRESHOLD: "threshold"}
        tensors = {names.get(name, name): tensor for name, tensor in t.items()}
        tensors.setdefault("threshold", torch.zeros_like(t["b_enc"]))
        if bool((tensors["threshold"] < 0).any()):
            raise FormatError(f"{file}: a threshold below 0 lets negative activations through; a SparseCoder has none")
        latents = len(t["b_enc"])
        cfg = SaeConfig(
            activation="jumprelu",
            num_latents=latents,
            k=min(32, latents),
            transcode=True,
            normalize_decoder=False,
            skip_connection="W_skip" in t,
        )
        coders[file.stem] = make(cfg, tensors, str(file))
    return coders


def plan(
    coders: dict[str, SparseCoder], metadata: dict[str, Any], allow_inexact: bool
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """What `save` would write: tensors by layer, and the configuration."""
    layers = {_layer(hook_of(name)): name for name in coders}
    if sorted(layers) != list(range(len(coders))):
        raise FormatError(
            f"circuit-tracer wants one transcoder for every layer from 0, found layers {sorted(layers)} "
            f"from {', '.join(list(coders)[:5])}"
        )
    for field in ("model_name", "feature_input_hook", "feature_output_hook"):
        if field not in metadata:
            raise FormatError(f"circuit-tracer's config.yaml needs {field}: pass it in metadata")
    if len({coder.num_latents for coder in coders.values()}) > 1:
        raise FormatError("circuit-tracer wants as many latents in every layer")
    contents = {layer: _contents(name, coders[name], allow_inexact) for layer, name in layers.items()}
    values = {"model_kind": "transcoder_set", **metadata}
    topk = {coder.cfg.k for coder in coders.values() if coder.cfg.activation == "topk"}
    if topk:
        if len(topk) > 1 or any(coder.cfg.activation != "topk" for coder in coders.values()):
            raise FormatError("circuit-tracer's config.yaml has one activation and one k for all layers")
        values |= {"activation": "topk", "k": topk.pop()}
    return contents, values


def save(coders: dict[str, SparseCoder], folder: Path, metadata: dict[str, Any], allow_inexact: bool) -> None:
    """All layers, from 0 without a gap, numbered by the last number in each hookpoint's name."""
    contents, values = plan(coders, metadata, allow_inexact)
    folder.mkdir(parents=True, exist_ok=True)
    for layer, tensors in contents.items():
        temporary = folder / f".layer_{layer}.tmp"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, folder / f"layer_{layer}.safetensors")
    (folder / CONFIG).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _contents(name: str, coder: SparseCoder, allow_inexact: bool) -> dict[str, Tensor]:
    cfg, layout = coder.cfg, "circuit_tracer"
    if coder.W_dec is None:
        raise refuse(name, "it was loaded without its decoder", layout)
    bias = coder.encoder.bias
    if coder.centre is not None:
        bias = bias - coder.encoder.weight @ coder.centre
    tensors = {"W_enc": coder.encoder.weight, "b_enc": bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    match cfg.activation:
        case "jumprelu":
            tensors[THRESHOLD] = coder.threshold
        case "batchtopk" if float(coder.threshold) >= 0:
            tensors[THRESHOLD] = coder.threshold.to(coder.dtype).expand(coder.num_latents)
        case "topk":
            if not allow_inexact:
                raise refuse(
                    name, "its top-k has no ReLU, so they agree only where k are positive; allow_inexact=True", layout
                )
        case _:
            raise refuse(name, f"it has no {cfg.activation} activation", layout)
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    return tensors


def _layer(name: str) -> int:
    numbers = re.findall(r"\d+", name)
    if not numbers:
        raise FormatError(f"{name!r} names no layer, which circuit-tracer's file names need")
    return int(numbers[-1])
