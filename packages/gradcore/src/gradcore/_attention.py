"""How the heads lie in a transformer's attention matrices, read off its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gradcore._module_plan import AttentionConfig, ModulePlan
from gradcore.layers import layer_for

_QUERIES = ("q_proj", "query", "q_lin")
_KEYS = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "out_lin")
_ATTENTION = ("attn", "attention", "self_attn")


def attention_heads(model: nn.Module) -> dict[str, AttentionConfig]:
    """Path of every attention matrix whose heads are known → how they lie, for ``CapturePlan.for_model(attention=…)``.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 4)})
    >>> model = Block()
    >>> model.config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    >>> attention_heads(model)["self_attn.k_proj"]
    AttentionConfig(num_heads=2, head_size=2, head_dim=2, side='out')

    Queries have ``num_attention_heads``; keys and values ``num_key_value_heads`` where attention is grouped. The output
    projection's heads lie on its input side. A fused ``c_attn`` (GPT-2) holds the heads of queries, keys and values one
    after another, 3·heads of them; a fused ``query_key_value`` (GPT-NeoX) three parts of each head beside each other.

    Args:
        model: with a ``config`` as transformers have it, an object or a mapping.

    Returns:
        Nothing for a matrix whose shape the configuration does not explain.
    """
    config = getattr(model, "config", None)
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    if not heads:
        return {}
    groups = _number(config, "num_key_value_heads") or heads
    found: dict[str, AttentionConfig] = {}
    for path, module in model.named_modules():
        parents, _, name = path.rpartition(".")
        layer = layer_for(module)
        if layer is None or layer.elementwise or not any(each in _ATTENTION for each in parents.split(".")):
            continue
        whole = ModulePlan.of(path, module, False)
        size = _number(config, "head_dim") or _head_size(whole, name, heads)
        config_of = {
            **dict.fromkeys(_QUERIES, (heads, size, "out")),
            **dict.fromkeys(_KEYS, (groups, size, "out")),
            **dict.fromkeys(_OUTPUTS, (heads, size, "in")),
            "c_attn": (3 * heads, size, "out"),
            "query_key_value": (heads, 3 * size, "out"),
        }.get(name)
        if config_of is None or not size:
            continue
        count, width, side = config_of
        if count * width == (whole.out_features if side == "out" else whole.in_features):
            found[path] = AttentionConfig(count, width, side=side)
    return found


def _head_size(plan: ModulePlan, name: str, heads: int) -> int:
    """From the model's width, which every one of these matrices has on one side."""
    width = plan.out_features if name in _OUTPUTS else plan.in_features
    return width // heads if width % heads == 0 else 0


def _number(config: Any, *names: str) -> int:
    for name in names:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return 0
