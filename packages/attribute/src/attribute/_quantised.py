"""Weights of 8 or 4 bits, by bitsandbytes: what loading them takes, and why it cannot be where it cannot."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from attribute._errors import ModelError

QUANTISED = ("int8", "int4")


def quantised_options(precision: str, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for weights of ``int8`` (LLM.int8) or ``int4`` (NF4).

    Gradients are those of the quantised weights, taken in half precision: float16 for int8, which knows no other, and
    bfloat16 for int4. Embeddings, norms and the output embedding are kept whole.

    Raises:
        ModelError: bitsandbytes, or accelerate, is not installed.
    """
    if missing := [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]:
        raise ModelError(
            f"--precision {precision} needs {' and '.join(missing)}: uv pip install 'attribute[quantised]' "
            "(or --precision bf16, which needs nothing)"
        )
    from transformers import BitsAndBytesConfig

    half = torch.float16 if precision == "int8" else torch.bfloat16
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if precision == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half)
    )
    return {"quantization_config": config, "dtype": half, "device_map": {"": device}}


def keep_gradients(model: nn.Module) -> None:
    """Have the layers of bitsandbytes leave a backward pass possible, which some of them do not on a CPU.

    In eval mode a 4-bit layer lays its weights out for a kernel that knows no backward pass, and whatever came before
    it would have no gradient. An 8-bit layer sets the outliers of its input to zero and puts them back, which autograd
    takes for a change of what it has saved: it gets a copy.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(_copied)


def _copied(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *rest = given
    return (first.clone() if isinstance(first, Tensor) and first.device.type == "cpu" else first, *rest)
