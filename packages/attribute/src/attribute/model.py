"""A causal language model taken apart at the output embedding: hidden states on one side, losses on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attribute._adapters import (
    AdapterFolder,
    has_adapters,
    output_modules,
    transformer_of,
    unwrapped,
    without_adapters,
)
from attribute._errors import ModelError
from attribute._fsdp import load_spread
from attribute._one_operation import in_one_operation
from attribute._probe import is_linear, is_plain, require_finite, require_same_logits
from attribute._quantised import QUANTISED, keep_gradients, quantised_options
from attribute.processes import pick_local
from gradcore import (
    MATRICES,
    AttentionConfig,
    CapturePlan,
    GradientCollector,
    Loss,
    attention_heads,
    model_fingerprint,
    not_collecting,
    per_example_loss,
    select_modules,
)

if TYPE_CHECKING:
    from attribute.config import IndexConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model and how its loss is measured.

    Attributes:
        name: what it was loaded from.
        model: the whole model, in eval mode; of one that PEFT has wrapped, the model inside.
        base: everything before the output embedding; module names are relative to it.
        fused: whether the chunked loss head stands in for the model's own. It does where the logits are the head of the
            base's output and nothing else; soft-capped or rescaled logits are taken from the model itself.
        reference: what the loss ``kl`` compares with; by default the model with its adapters switched off.
        sharded: whether its parameters are spread over the processes of a run (``--fsdp``).
        known: fingerprints of base and output embedding, where the whole weights are not there to take them of.
    """

    name: str
    model: nn.Module
    base: nn.Module
    fused: bool
    reference: LanguageModel | None = None
    sharded: bool = False
    known: tuple[str, str] = ("", "")

    @classmethod
    def wrap(cls, model: nn.Module, name: str = "") -> LanguageModel:
        """Find base and head of a transformers causal language model, or of one with PEFT's adapters.

        Raises:
            ModelError: no output embedding, weights that are not finite, or adapters that are more than layers of the
                model (prompt tuning).
        """
        whole, base = unwrapped(model), transformer_of(model)
        head = getattr(whole, "get_output_embeddings", lambda: None)()
        if base is whole or not is_linear(head):
            raise ModelError(f"{name or type(model).__name__} is no causal language model with an output embedding")
        require_finite(whole, name)
        fused = is_plain(whole, base, head, name)
        if whole is not model:
            require_same_logits(model, whole, name)
        return cls(name, whole, base, fused)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @cached_property
    def outside(self) -> dict[str, nn.Module]:
        """The output embedding, which lies outside the base, by its name in the whole model."""
        return output_modules(self.model)

    def module(self, path: str) -> nn.Module:
        """A module by the name it has in plans."""
        return self.outside[path] if path in self.outside else self.base.get_submodule(path)

    def collector(self, plan: CapturePlan, **options: Any) -> GradientCollector:
        """A collector over base and output embedding."""
        return GradientCollector(self.base, plan, outside=self.outside, **options)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding: token ids must stay below."""
        return self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]

    @property
    def context(self) -> int | None:
        """Most tokens a row may have, as the model's configuration states it."""
        config = self.model.config
        return next(
            (getattr(config, name) for name in ("max_position_embeddings", "n_positions") if hasattr(config, name)),
            None,
        )

    def fingerprint(self) -> str:
        """Fingerprint of the weights of the base model, whose modules are captured."""
        return self.known[0] or model_fingerprint(self.base)

    def head_fingerprint(self) -> str:
        """Fingerprint of the output embedding, which shapes every gradient below it."""
        return self.known[1] or model_fingerprint(self.model.get_output_embeddings())  # type: ignore[operator]

    def _heads(self, patterns: Sequence[str]) -> dict[str, AttentionConfig]:
        if not patterns:
            return {}
        known = attention_heads(self.base)
        if not known:
            raise ModelError(
                f"{self.name or 'the model'} does not say how its heads lie: collect_gradients(attention_cfgs=…) does"
            )
        return {path: known[path] for path in select_modules(known, patterns)}

    def losses(self, input_ids: Tensor, labels: Tensor, reduction: str = "sum", loss: str = "ce") -> Tensor:
        """Loss of each row ``[n]`` in nats, in float32; ``[n, s]`` ids and labels; the losses are :class:`Loss`'s."""
        kind = Loss.named(loss)
        if self.fused:
            head = self.model.get_output_embeddings()  # type: ignore[operator]
            other = self._reference_states(input_ids) if kind.name == "kl" else None
            hidden = self.base(input_ids=input_ids, use_cache=False)[0]
            return per_example_loss(
                hidden, head.weight, labels, bias=head.bias, reduction=reduction, loss=loss, reference=other
            )
        if kind.name == "kl":
            raise ModelError(f"{self.name or 'the model'} rescales its logits, for which --loss-fn kl is not there yet")
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return _logit_losses(logits, labels, reduction, kind)

    def _without_adapters(self) -> AbstractContextManager[None]:
        if not has_adapters(self.model):
            raise ModelError(
                "--loss-fn kl compares with a reference: name --reference-model, or let --model be the folder of an "
                "adapter, to compare with its base"
            )
        return without_adapters(self.model)

    def _reference_states(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states and output embedding of what is compared with."""
        other = self.reference or self
        head = other.model.get_output_embeddings()  # type: ignore[operator]
        with torch.no_grad(), not_collecting(), nullcontext() if self.reference else self._without_adapters():
            return other.base(input_ids=input_ids, use_cache=False)[0], head.weight, head.bias

    def plan(self, config: IndexConfig, attention: Mapping[str, AttentionConfig] | None = None) -> CapturePlan:
        """What the configuration captures of this model, with the heads of ``attention`` one by one.

        Raises:
            ModelError: heads are asked for that the model's configuration does not tell.
        """
        attention = {**self._heads(config.split_attention_modules), **(attention or {})}
        return CapturePlan.for_model(
            self.base,
            config.modules or None,
            exclude=config.exclude,
            kinds=None if config.modules else MATRICES,
            sketch=config.sketch,
            loss=str(Loss(config.loss_fn, config.label_smoothing)),
            reduction=config.loss_reduction,
            include_bias=config.include_bias,
            attention=attention,
            fingerprint=self.fingerprint(),
            # Who names no modules gets the base's; the output embedding is for who asks for it.
            outside=self.outside if config.modules else None,
        )


def load_model(name: str, *, precision: str = "fp32", device: str = "auto", revision: str = "") -> LanguageModel:
    """Load a causal language model from a folder or the hub, or an adapter's folder with its base model.

    Raises:
        ModelError: nothing there, no causal language model, weights that are not finite, or no means to quantise them.
    """
    _require_model_name(name)
    quantised = precision in QUANTISED
    options = quantised_options(precision, pick_device(device)) if quantised else {"dtype": _DTYPES[precision]}
    adapter = AdapterFolder.at(name)
    if adapter is None:
        model = _loaded(name, revision, options, precision)
    else:
        model = _loaded(adapter.base, revision or adapter.revision, options, precision)
        adapter.attach(model)
    in_one_operation(model)
    if not quantised:
        return LanguageModel.wrap(_moved(model, device), name)
    keep_gradients(model)
    try:
        return LanguageModel.wrap(model, name)  # made where it is, and it cannot be moved
    except (AssertionError, RuntimeError) as error:  # bitsandbytes has no kernel for some shapes on some devices
        where = model.device.type
        raise ModelError(f"the model {name!r} does not run in {precision} on {where}: {_first_line(error)}") from error


def _loaded(name: str, revision: str, options: Mapping[str, Any], precision: str) -> Any:
    """A transformers model whose weights are all there."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, revision=revision or "main", output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        wanted = f" in {precision}" if precision in QUANTISED else ""
        raise ModelError(f"the model {name!r} cannot be loaded{wanted}: {_first_line(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the model {name!r} lacks {len(missing)} weights that its config.json asks for, such as {missing[0]}: "
            "transformers would fill them with random numbers. Is the checkpoint whole, and of this architecture?"
        )
    return model


def model_of(config: IndexConfig, *, name: str = "", device: str = "") -> LanguageModel:
    """The model that a configuration names, with its reference where the loss needs one."""
    device = device or config.device

    def load(which: str, revision: str) -> LanguageModel:
        if not config.fsdp:
            return load_model(which, precision=config.precision, device=device, revision=revision)

        def whole() -> LanguageModel:
            return load_model(which, precision=config.precision, device="cpu", revision=revision)

        return load_spread(whole, pick_device(device))

    model = load(name or config.model, config.revision)
    if not config.reference_model:
        return model
    reference = load(config.reference_model, "")
    heads = [each.model.get_output_embeddings().weight for each in (model, reference)]  # type: ignore[operator]
    if len(heads[0]) != len(heads[1]):
        raise ModelError(
            f"{config.reference_model} has a vocabulary of {len(heads[1])}, {model.name} one of {len(heads[0])}: their "
            "predictions cannot be compared"
        )
    return replace(model, reference=reference)


def load_tokenizer(name: str, revision: str = "") -> Any:
    """Load the tokenizer of a folder or hub id; :class:`ModelError` if there is none.

    An adapter without one has that of its base model.
    """
    _require_model_name(name)
    from transformers import AutoTokenizer

    adapter = AdapterFolder.at(name)
    if adapter is not None and not adapter.has_tokenizer:
        name, revision = adapter.base, revision or adapter.revision

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer of {name!r} cannot be loaded: {_first_line(error)} (--tokenizer names another)"
        ) from error
    if not tokenizer.vocab_size:  # transformers 5 makes an empty one where the files are missing
        raise ModelError(f"no tokenizer in {name!r}: its vocabulary is empty (--tokenizer names another)")
    return tokenizer


def pick_device(device: str) -> torch.device:
    """``"auto"`` is the GPU where there is one, and this process's own where there are several of both."""
    if device == "auto":
        return pick_local("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"no device {device!r}: {_first_line(error)}") from error


def _moved(model: nn.Module, device: str) -> nn.Module:
    try:
        return model.to(pick_device(device))
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts
        raise ModelError(f"the model cannot be moved to device {device!r}: {_first_line(error)}") from error


def _require_model_name(name: str) -> None:
    if not name:
        raise ModelError("no model is named: --model takes a folder or a hub id")
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no model folder {name!r}: --model takes a folder or a hub id")
    if path.is_dir() and not any((path / each).exists() for each in ("config.json", "adapter_config.json")):
        raise ModelError(f"the folder {name!r} holds no config.json, nor an adapter_config.json, so no model")


def _logit_losses(logits: Tensor, labels: Tensor, reduction: str, kind: Loss) -> Tensor:
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().mT, targets, reduction="none", ignore_index=-100, label_smoothing=kind.smoothing
    )
    if kind.name == "log_odds":
        losses = torch.where(targets != -100, losses + (-torch.expm1(-losses)).clamp(min=1e-7).log(), 0)
    total = losses.sum(1)
    return total if reduction == "sum" else total / (targets != -100).sum(1).clamp(min=1)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
