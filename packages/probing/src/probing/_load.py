"""The model and tokenizer that ``trace probe`` names: of the right class, with all weights that matter, on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probing._errors import ConfigError, DataError
from probing._structure import example_inputs, find_blocks
from probing._tensors import first_tensor, replace_first_tensor

_DTYPES: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}


@dataclass(frozen=True)
class Source:
    """Where a model comes from, read before its weights are.

    Attributes:
        name: folder or hub id.
        config: the model's.
        tokenizer: its tokenizer.
        blocks: the list of blocks to probe, where the model has several.
    """

    name: str
    config: Any
    tokenizer: Any
    blocks: str | None = None

    @property
    def context(self) -> int | None:
        """Most tokens a row may have, as the configuration states it."""
        text = self.config.get_text_config()
        found = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions"))
        return next((n for n in found if isinstance(n, int) and n > 0), None)


def find_source(name: str, blocks: str | None = None) -> Source:
    """Configuration and tokenizer of a model.

    Raises:
        ConfigError: nothing there, or no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"there is no model folder {name!r}: MODEL is a folder or a hub id")
    with _errors_of(f"the model {name!r}"), _quiet():
        config = AutoConfig.from_pretrained(name)
    with _errors_of(f"the tokenizer of {name!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="right")
    if not tokenizer.vocab_size:  # transformers 5 makes an empty one where the files are missing
        raise ConfigError(f"no tokenizer in {name!r}: its vocabulary is empty")
    return Source(name, config, tokenizer, blocks)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and the weights that its checkpoint lacked and transformers drew at random."""

    model: Any
    random: list[str]


def load_model(source: Source, *, precision: str = "fp32", device: str = "auto") -> Loaded:
    """Load a model in the class that its readouts and answers need.

    Decoders come with the head that says the next token, everything else in the class that its configuration names; of
    an encoder-decoder, the encoder alone.

    Raises:
        ConfigError: a model that cannot be loaded so, that lacks weights its blocks use, or a device that is not there.
    """
    kind, options = _kind(source)
    with _errors_of(f"the model {source.name!r}"), _quiet():
        model, report = kind.from_pretrained(source.name, dtype=_DTYPES[precision], output_loading_info=True, **options)
    model.eval()
    random = sorted(report["missing_keys"])
    if random and (used := _used_by_blocks(model, random, source.blocks)):
        raise ConfigError(
            f"the model {source.name!r} lacks {len(used)} weights that its blocks use, such as {used[0]}: transformers "
            "would fill them with random numbers. Is the checkpoint whole, and of this architecture?"
        )
    with _errors_of(f"device {device!r}", "cannot be used"):
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        model.to(where)
    return Loaded(model, random)


def _kind(source: Source) -> tuple[Any, dict[str, Any]]:
    """The class to load, and options that go with it."""
    import transformers

    config, named = source.config, next(iter(source.config.architectures or []), "")
    if getattr(config, "is_encoder_decoder", False):
        return _encoder(source), {"is_encoder_decoder": False}
    # Encoders that could be made decoders say that they are none; decoders say nothing.
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and getattr(config, "is_decoder", True):
        return transformers.AutoModelForCausalLM, {}
    return getattr(transformers, named, transformers.AutoModel), {}


def _encoder(source: Source) -> Any:
    import transformers

    alone = type(source.config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    if alone and source.blocks is not None and source.blocks.startswith("encoder."):
        return transformers.AutoModelForTextEncoding
    hint = "type --blocks encoder.block to probe its encoder alone. " if alone else ""
    raise ConfigError(
        f"{source.config.model_type} is an encoder-decoder: {hint}A decoder with an encoder is probed from Python, "
        "where ResidualUpdateModelConfig takes blocks='decoder.…' and the data decoder_input_ids"
    )


def _used_by_blocks(model: nn.Module, names: Sequence[str], blocks: str | None) -> list[str]:
    """Those of the parameters that a gradient of the last block's output reaches: heads and poolers lie behind it."""
    found = {name: p for name, p in model.named_parameters() if name in names and p.is_floating_point()}
    last = find_blocks(model, blocks)[1][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_hook(lambda _, args, output: seen.append(first_tensor(output)))  # type: ignore[arg-type]
    try:
        with torch.enable_grad():
            model(**example_inputs(model))
    finally:
        handle.remove()
    gradients = torch.autograd.grad(seen[-1].sum(), list(found.values()), allow_unused=True)
    return [name for name, gradient in zip(found, gradients) if gradient is not None]


def check_positions(model: nn.Module, lengths: Sequence[int], places: Sequence[str]) -> None:
    """Refuse a row longer than the model's learned positions, of which RoBERTa and its kin keep some for padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            room = module.num_embeddings - module.padding_idx - 1
            for length, place in zip(lengths, places):
                if length > room:
                    raise DataError(
                        f"{place}: {length} tokens, but the model has positions for {room}; type --max-length {room}, "
                        "with --cut to keep the beginning of longer texts"
                    )


def require_next_token(loaded: Loaded, name: str) -> None:
    """Refuse a model that says no next token, says it with random weights, or looks ahead.

    Raises:
        ConfigError: with the reason.
    """
    model, kind = loaded.model, type(loaded.model).__name__
    if loaded.random:
        raise ConfigError(
            f"{name!r} lacks {len(loaded.random)} weights of {kind}, such as {loaded.random[0]}, and transformers has "
            "drawn them at random: what such a model says next means nothing. evaluate needs a whole language model"
        )
    inputs = example_inputs(model)
    logits, nudge = _nudged_logits(model, inputs)
    shape = (*inputs["input_ids"].shape, model.config.get_text_config().vocab_size)
    if logits is None or logits.shape[:2] != shape[:2] or logits.shape[-1] < shape[-1]:
        raise ConfigError(
            f"{kind} says no next token: evaluate asks for the likeliest answer, so give a language model"
        )
    (reach,) = torch.autograd.grad(logits[:, 0].float().square().sum(), nudge)
    reach = reach.float().abs()
    if float(reach[:, 1:].max()) > 1e-6 * float(reach[:, 0].max()):
        raise ConfigError(
            f"{kind} looks ahead: a later token changes what it says about earlier ones, so it has no next token to "
            "answer with. evaluate takes left-to-right language models; probing.evaluate.ablation takes any measure"
        )


def _nudged_logits(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """The logits of one batch, and a zero added to its embedded tokens, to take gradients by."""
    nudges: list[Tensor] = []

    def add(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        nudges.append(torch.zeros_like(output, requires_grad=True))
        return replace_first_tensor(output, output + nudges[-1])

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        with torch.enable_grad():
            output = model(**inputs)
    finally:
        handle.remove()
    return getattr(output, "logits", None), nudges[0]


@contextmanager
def _errors_of(what: str, failed: str = "cannot be loaded") -> Iterator[None]:
    from safetensors import SafetensorError

    kinds = (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError, SafetensorError)
    try:
        yield
    except kinds as error:
        first = str(error).strip().splitlines()
        raise ConfigError(f"{what} {failed}: {first[0] if first else type(error).__name__}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No table of unused heads: what is missing is looked at here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
