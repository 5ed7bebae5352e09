"""dictionary_learning: ``ae.pt`` beside ``config.json``, whose ``dict_class`` decides what the tensors mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify._coder import SparseCoder
from sparsify._config import SaeConfig
from sparsify._errors import FormatError, check_choice
from sparsify._files import safe_name, write_json
from sparsify.convert._foreign import Options, folders_with, make, read_json, read_pickle, refuse, unit_rows

FILE = "ae.pt"
_BY_NAMES = {
    "AutoEncoder": {"bias", "encoder.weight", "encoder.bias", "decoder.weight"},
    "AutoEncoderNew": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
    "GatedAutoEncoder": {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"},
    "JumpReluAutoEncoder": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
    "MatryoshkaBatchTopKSAE": {"W_enc", "b_enc", "W_dec", "b_dec", "k", "threshold", "group_sizes"},
}
_TOPK = {"b_dec", "encoder.weight", "encoder.bias", "decoder.weight", "k"}
"""AutoEncoderTopK and BatchTopKSAE have the same names; only a configuration can tell them apart."""
CLASSES = (*_BY_NAMES, "AutoEncoderTopK", "BatchTopKSAE")


def matches(path: Path, options: Options) -> bool:
    """A folder with ae.pt, or of such folders, or a torch file with one of the classes' names in it."""
    if path.is_dir():
        return bool(folders_with(path, FILE))
    if path.suffix not in (".pt", ".pth"):
        return False
    names = set(_state(read_pickle(path, options.allow_pickle)))
    return names >= _TOPK or names in _BY_NAMES.values()


def load(path: Path, options: Options) -> dict[str, SparseCoder]:
    """One coder or many."""
    if not path.is_dir():
        return {path.stem: _load_one(path, options)}
    return {name: _load_one(home / FILE, options) for name, home in folders_with(path, FILE).items()}


def _load_one(file: Path, options: Options) -> SparseCoder:
    raw = read_pickle(file, options.allow_pickle)
    t = {name: value for name, value in _state(raw).items() if isinstance(value, Tensor)}
    kind = _class_of(file, set(t), options)
    shift = _shift(raw, options, file)
    build = {
        "AutoEncoder": _relu,
        "AutoEncoderNew": _relu,
        "GatedAutoEncoder": _gated,
        "JumpReluAutoEncoder": _jump,
        "MatryoshkaBatchTopKSAE": _topk,
        "AutoEncoderTopK": _topk,
        "BatchTopKSAE": _topk,
    }[kind]
    try:
        activation, tensors, k = build(kind, t)
    except KeyError as error:
        raise FormatError(f"{file}: {kind} needs the tensor {error}, found {', '.join(sorted(t))}") from None
    if shift is not None:
        # The dictionary saw x − m and returned x̂ − m; centring by b_dec + m does both.
        tensors["b_dec"] = tensors["b_dec"] + shift
    groups = tuple(torch.as_tensor(t["group_sizes"]).cumsum(0).tolist()) if "group_sizes" in t else ()
    latents = len(tensors["encoder.bias"])
    cfg = SaeConfig(
        activation=activation,
        num_latents=latents,
        k=k or min(32, latents),
        normalize_decoder=unit_rows(tensors["W_dec"]),
        matryoshka=groups,
    )
    return make(cfg, tensors, str(file))


def plan(coders: dict[str, SparseCoder], metadata: dict[str, Any], allow_inexact: bool) -> dict[str, Any]:
    """What `save` would write, by hookpoint."""
    del metadata, allow_inexact
    return {name: _contents(name, coder) for name, coder in coders.items()}


def save(coders: dict[str, SparseCoder], folder: Path, metadata: dict[str, Any], allow_inexact: bool) -> None:
    """``{hookpoint}/ae.pt`` and ``config.json``; the pickle is what dictionary_learning itself reads."""
    for name, (kind, tensors) in plan(coders, metadata, allow_inexact).items():
        coder = coders[name]
        home = folder / safe_name(name)
        home.mkdir(parents=True, exist_ok=True)
        torch.save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, home / "ae.tmp")
        os.replace(home / "ae.tmp", home / FILE)
        described = {"dict_class": kind, "activation_dim": coder.d_in, "dict_size": coder.num_latents, "k": coder.cfg.k}
        write_json(home / "config.json", {"trainer": {**described, "submodule_name": name, **metadata}, "buffer": {}})


def _relu(kind: str, t: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], int]:
    weight, bias = t["encoder.weight"], t["encoder.bias"]
    b_dec = t["bias"] if kind == "AutoEncoder" else t["decoder.bias"]
    if kind == "AutoEncoderNew":
        bias = bias + weight @ b_dec  # it does not centre its input
    decoder = t["decoder.weight"].T.contiguous()
    zero = torch.zeros_like(bias)
    return (
        "jumprelu",
        {"encoder.weight": weight, "encoder.bias": bias, "W_dec": decoder, "b_dec": b_dec, "threshold": zero},
        0,
    )


def _gated(kind: str, t: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], int]:
    del kind
    tensors = {"encoder.weight": t["encoder.weight"], "encoder.bias": t["gate_bias"], "b_dec": t["decoder_bias"]}
    tensors |= {"W_dec": t["decoder.weight"].T.contiguous(), "r_mag": t["r_mag"], "b_mag": t["mag_bias"]}
    return "gated", tensors, 0


def _jump(kind: str, t: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], int]:
    del kind
    weight = t["W_enc"].T.contiguous()
    bias = t["b_enc"] + weight @ t["b_dec"]  # it does not centre its input
    tensors = {"encoder.weight": weight, "encoder.bias": bias, "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    return "jumprelu", {**tensors, "threshold": t["threshold"].clamp_min(0)}, 0


def _topk(kind: str, t: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], int]:
    if "W_enc" in t:
        weight, bias, decoder = t["W_enc"].T.contiguous(), t["b_enc"], t["W_dec"]
    else:
        weight, bias, decoder = t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T.contiguous()
    tensors = {"encoder.weight": weight, "encoder.bias": bias, "W_dec": decoder, "b_dec": t["b_dec"]}
    k = int(t["k"])
    if kind == "AutoEncoderTopK":
        return "topk", tensors, k
    return "batchtopk", {**tensors, "threshold": t["threshold"].float()}, k


def _contents(name: str, coder: SparseCoder) -> tuple[str, dict[str, Tensor]]:
    cfg, layout = coder.cfg, "dictionary_learning"
    if coder.W_dec is None:
        raise refuse(name, "it was loaded without its decoder", layout)
    if cfg.transcode or coder.W_skip is not None:
        raise refuse(name, "dictionary_learning has neither transcoders nor skip connections", layout)
    weight, bias, decoder = coder.encoder.weight, coder.encoder.bias, coder.W_dec
    named = {"encoder.weight": weight, "decoder.weight": decoder.T}
    match cfg.activation:
        case "topk" | "batchtopk":
            threshold = torch.tensor(-1.0) if cfg.activation == "topk" else coder.threshold
            tensors = {**named, "encoder.bias": bias, "b_dec": coder.b_dec}
            tensors |= {"k": torch.tensor(cfg.k, dtype=torch.int), "threshold": threshold}
            return ("AutoEncoderTopK" if cfg.activation == "topk" else "BatchTopKSAE"), tensors
        case "jumprelu":
            raw = {"W_enc": weight.T, "b_enc": bias - weight @ coder.b_dec, "W_dec": decoder, "b_dec": coder.b_dec}
            return "JumpReluAutoEncoder", {**raw, "threshold": coder.threshold}
        case "gated":
            tensors = {**named, "decoder_bias": coder.b_dec, "gate_bias": bias}
            return "GatedAutoEncoder", {**tensors, "r_mag": coder.r_mag, "mag_bias": coder.b_mag}
        case "groupmax":
            raise refuse(name, "no other library has the groupmax activation", layout)


def _state(raw: dict[str, Any]) -> dict[str, Any]:
    for wrapper in ("state_dict", "ae"):
        if isinstance(raw.get(wrapper), dict):
            return raw[wrapper]
    return raw


def _class_of(file: Path, names: set[str], options: Options) -> str:
    config = file.with_name("config.json")
    named = options.dict_class
    if named is None and config.exists():
        named = read_json(config).get("trainer", {}).get("dict_class")
    if named is not None:
        check_choice("dict_class", named, CLASSES)
        return named
    for kind, expected in _BY_NAMES.items():
        if names == expected:
            return kind
    if names >= _TOPK:
        raise FormatError(
            f"{file} may be an AutoEncoderTopK (k per token) or a BatchTopKSAE (a threshold): their files "
            "look alike and no config.json says which; pass dict_class"
        )
    raise FormatError(f"{file} is of no dictionary_learning class: it holds {', '.join(sorted(names))}")


def _shift(raw: dict[str, Any], options: Options, file: Path) -> Tensor | None:
    mean = raw.get("act_mean")
    if not isinstance(mean, Tensor) or not bool(mean.any()):
        return None
    if options.act_mean is None:
        raise FormatError(
            f"{file} carries an act_mean, and nothing says whether it was subtracted from the training data: pass "
            "act_mean='fold' if it was, 'ignore' if not"
        )
    check_choice("act_mean", options.act_mean, ("fold", "ignore"))
    return mean if options.act_mean == "fold" else None
