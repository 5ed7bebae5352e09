"""PEFT's adapters: the model that they lie in, and folders that hold nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from attribute._errors import ModelError

_CONFIG = "adapter_config.json"


def unwrapped(module: nn.Module) -> nn.Module:
    """The transformers model that PEFT has wrapped, its adapters inside; any other module is returned as it is.

    A ``PeftModel`` holds a tuner (``LoraModel``), which holds the model. Both wrappers call it and add nothing.
    """
    if "peft" not in sys.modules:  # nobody can have one of its models
        return module
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    tuner: Any = module.base_model if isinstance(module, (PeftModel, PeftMixedModel)) else module
    return tuner.model if isinstance(tuner, BaseTuner) else tuner


def transformer_of(module: nn.Module) -> nn.Module:
    """The transformer below the output embedding, to which module names are relative.

    Args:
        module: a ``PeftModel``, its tuner, a model with a head, or a transformer, which is its own.
    """
    whole = unwrapped(module)
    base = getattr(whole, "base_model", whole)
    return base if isinstance(base, nn.Module) else whole


def output_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The output embedding by its name in the model, where it lies outside the transformer; with what PEFT put in."""
    whole, base = unwrapped(module), transformer_of(module)
    head = getattr(whole, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module) or any(each is head for each in base.modules()):
        return {}
    name = next(name for name, each in whole.named_modules() if each is head)
    return dict(head.named_modules(prefix=name))


def has_adapters(module: nn.Module) -> bool:
    """Whether PEFT has put adapters into the model."""
    return any(True for _ in _layers(module))


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside, the model is the one that its adapters were put into."""
    trained = {each: each.requires_grad for each in module.parameters()}
    layers = [each for each in _layers(module) if not each.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, was in trained.items():  # PEFT unfreezes what it enables
            parameter.requires_grad_(was)


def _layers(module: nn.Module) -> Iterator[Any]:
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for each in module.modules():
        if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield each


@dataclass(frozen=True)
class AdapterFolder:
    """A folder of ``save_pretrained`` of a PEFT model: the adapter's weights, and the name of its base model.

    Example::

        folder = AdapterFolder.at("runs/lora")
        model = AutoModelForCausalLM.from_pretrained(folder.base, revision=folder.revision)
        folder.attach(model)

    Attributes:
        path: the folder.
        base: the base model's folder or hub id.
        revision: of the base model on the hub, ``""`` where the adapter names none.
    """

    path: Path
    base: str
    revision: str = ""

    @classmethod
    def at(cls, name: str) -> AdapterFolder | None:
        """The adapter of a folder; ``None`` where it is no folder, or holds the weights of a whole model.

        Raises:
            ModelError: PEFT is not installed, or the base model is not named or not there.
        """
        path = Path(name).expanduser()
        file = path / _CONFIG
        if not file.is_file():
            return None
        if find_spec("peft") is None:
            raise ModelError(f"the model {name!r} is a PEFT adapter, which needs peft: pip install peft")
        if any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin")):
            return None  # transformers finds an adapter beside the weights of its base by itself
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            base, revision = config.get("base_model_name_or_path") or "", config.get("revision") or ""
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{file} cannot be read as an adapter's configuration: {error}") from error
        return cls(path, _found(base, path), revision)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved beside the adapter."""
        return any((self.path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))

    def attach(self, model: Any) -> None:
        """Put the adapter into its base model, in the model's precision; the adapter alone stays to be trained.

        Raises:
            ModelError: no adapter for this model, or one whose weights are missing.
        """
        try:
            report = model.load_adapter(str(self.path), is_trainable=True)
        except Exception as error:  # PEFT has exceptions of many kinds for what does not fit
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"the adapter {self.path} cannot be put into {self.base!r}: {reason}") from error
        for what, names in (("lacks", report.missing_keys), ("has other shapes for", report.mismatched_keys)):
            if names:
                raise ModelError(
                    f"the adapter {self.path} {what} {len(names)} weights, such as {min(map(str, names))}: "
                    f"is it whole, and of the model {self.base!r}?"
                )
        if report.unexpected_keys:
            raise ModelError(
                f"{self.base!r} has no place for {len(report.unexpected_keys)} weights of the adapter {self.path}, "
                f"such as {min(report.unexpected_keys)}: is it of another model?"
            )


def _found(base: str, folder: Path) -> str:
    """The base model as it is named, or from the adapter's folder on; a name without a folder is a hub id."""
    file = folder / _CONFIG
    if not base:
        raise ModelError(f"{file} names no base model: put its folder or hub id under base_model_name_or_path")
    for place in (Path(base).expanduser(), folder / base):
        if place.is_dir():
            return str(place)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(
            f"the adapter {str(folder)!r} is for the base model {base!r}, and there is no such folder: put where it "
            f"lies now under base_model_name_or_path in {file}"
        )
    return base
