"""SAELens 6: ``cfg.json`` and ``sae_weights.safetensors``, W_enc (D, M) and W_dec (M, Do).

SAELens computes max(a, 0) · 1[a > θ]; a plain ReLU is therefore the JumpReLU of θ = 0, and a negative θ acts as 0.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsify._coder import SparseCoder
from sparsify._config import Activation, SaeConfig
from sparsify._errors import FormatError
from sparsify._files import read_tensors, safe_name, write_json
from sparsify.convert._foreign import Options, folders_with, make, read_json, refuse, unit_rows

FILE = "sae_weights.safetensors"
VERSION = "6.54.12"
"""The version whose files these are; SAELens reads files that name none as its old format."""
_KINDS: dict[str, tuple[Activation, bool]] = {
    "standard": ("jumprelu", False),
    "topk": ("topk", False),
    "jumprelu": ("jumprelu", False),
    "gated": ("gated", False),
    "transcoder": ("jumprelu", True),
    "skip_transcoder": ("jumprelu", True),
    "jumprelu_transcoder": ("jumprelu", True),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


def matches(path: Path, options: Options) -> bool:
    """A folder with sae_weights.safetensors, or of such folders."""
    del options
    return path.is_dir() and bool(folders_with(path, FILE))


def load(path: Path, options: Options) -> dict[str, SparseCoder]:
    """One coder or many, of any of the architectures a SparseCoder can compute."""
    del options
    return {name: _load_one(home) for name, home in folders_with(path, FILE).items()}


def _load_one(path: Path) -> SparseCoder:
    values, t = read_json(path / "cfg.json"), read_tensors(path / FILE)
    kind = values.get("architecture")
    if kind not in _KINDS:
        raise FormatError(f"{path}: SAELens' architecture {kind!r} has no SparseCoder; known are {', '.join(_KINDS)}")
    for field, harmless in (("normalize_activations", ("none", None)), ("reshape_activations", ("none", None))):
        if values.get(field) not in harmless:
            raise FormatError(
                f"{path}: {field}={values[field]!r} changes the input by more than a bias: fold it with SAELens first"
            )
    activation, transcode = _KINDS[kind]
    scale = t.pop("scaling_factor", None)
    if scale is not None and not bool((scale == 1).all()):
        raise FormatError(f"{path}: scaling_factor is not all ones, and a SparseCoder has no such parameter")
    bias = t.get("b_enc", t.get("b_gate"))
    if bias is None:
        raise FormatError(f"{path}: {FILE} has no encoder bias, only {', '.join(sorted(t))}")
    weight, decoder = t["W_enc"].T.contiguous(), t["W_dec"]
    if values.get("rescale_acts_by_decoder_norm"):
        # Products are ranked by a_j ‖w_j‖ and divided again when decoding: the same as moving the norms.
        norms = decoder.norm(dim=1)
        weight, bias, decoder = weight * norms[:, None], bias * norms, decoder / norms[:, None]
    if not transcode and not values.get("apply_b_dec_to_input", True):
        bias = bias + weight @ t["b_dec"]
    tensors = {"encoder.weight": weight, "encoder.bias": bias, "W_dec": decoder, "b_dec": t["b_dec"]}
    if activation == "jumprelu":
        tensors["threshold"] = t.get("threshold", torch.zeros_like(bias)).clamp_min(0)
    if activation == "gated":
        tensors |= {"r_mag": t["r_mag"], "b_mag": t["b_mag"]}
    if "W_skip" in t:
        tensors["W_skip"] = t["W_skip"]
    cfg = SaeConfig(
        activation=activation,
        num_latents=len(bias),
        k=int(values.get("k") or min(32, len(bias))),
        normalize_decoder=not transcode and unit_rows(decoder),
        transcode=transcode,
        skip_connection="W_skip" in t,
    )
    return make(cfg, tensors, str(path))


def plan(coders: dict[str, SparseCoder], metadata: dict[str, Any], allow_inexact: bool) -> dict[str, Any]:
    """What `save` would write, by hookpoint."""
    del metadata, allow_inexact
    return {name: _contents(name, coder) for name, coder in coders.items()}


def save(coders: dict[str, SparseCoder], folder: Path, metadata: dict[str, Any], allow_inexact: bool) -> None:
    """A folder per hookpoint."""
    for name, (tensors, values) in plan(coders, metadata, allow_inexact).items():
        values["metadata"] = {"sae_lens_version": VERSION, "hook_name": name, **metadata}
        home = folder / safe_name(name)
        home.mkdir(parents=True, exist_ok=True)
        temporary = home / f".{FILE}.tmp"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
        os.replace(temporary, home / FILE)
        write_json(home / "cfg.json", values)


def _contents(name: str, coder: SparseCoder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    cfg = coder.cfg
    if coder.W_dec is None:
        raise refuse(name, "it was loaded without its decoder", "saelens")
    tensors = {"W_enc": coder.encoder.weight.T, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    values: dict[str, Any] = {
        "d_in": coder.d_in,
        "d_sae": coder.num_latents,
        "dtype": str(coder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not cfg.transcode,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    match cfg.activation:
        case "topk" if not cfg.transcode:
            values |= {"architecture": "topk", "k": cfg.k, "rescale_acts_by_decoder_norm": False}
        case "jumprelu":
            values["architecture"] = "jumprelu"
            tensors["threshold"] = coder.threshold
        case "batchtopk":
            if float(coder.threshold) < 0:
                raise refuse(name, "its threshold has not been learned yet", "saelens")
            values["architecture"] = "jumprelu"
            tensors["threshold"] = coder.threshold.to(coder.dtype).expand(coder.num_latents)
        case "gated" if not cfg.transcode:
            values["architecture"] = "gated"
            tensors |= {"b_gate": coder.encoder.bias, "r_mag": coder.r_mag, "b_mag": coder.b_mag}
        case "topk" | "gated":
            raise refuse(name, f"SAELens has no {cfg.activation} transcoder", "saelens")
        case "groupmax":
            raise refuse(name, "no other library has the groupmax activation", "saelens")
    if cfg.activation != "gated":
        tensors["b_enc"] = coder.encoder.bias
    if coder.W_skip is not None and not cfg.transcode:
        raise refuse(name, "SAELens has skip connections in transcoders only", "saelens")
    if cfg.transcode:
        values |= {"d_out": coder.d_out, "architecture": "jumprelu_transcoder"}
        if coder.W_skip is not None:
            values["architecture"], tensors["W_skip"] = "jumprelu_skip_transcoder", coder.W_skip
    return tensors, values
