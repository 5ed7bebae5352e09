"""Models and token rows by name, as the command line knows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify._errors import ConfigError, DataError, check_whole
from sparsify.data import MemmapDataset, StreamedRows, TooShortError, chunk_and_tokenize, documents


def load_model(
    name: str,
    *,
    head: bool,
    revision: str | None,
    token: str | None,
    eight_bit: bool,
    device: str,
    precision: str = "auto",
) -> Any:
    """A transformer on a device, without its head unless needed.

    ``precision="auto"`` is bf16 where a GPU has it and the checkpoint's own dtype elsewhere.
    """
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"revision": revision, "token": token}
    if eight_bit:
        if precision != "auto":
            raise ConfigError(f"--load_in_8bit and --precision {precision} both say how the model is held: give one")
        _need_bitsandbytes()
        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": torch.float16}
        options["device_map"] = {"": device}
    else:
        if precision == "auto" and device.startswith("cuda") and torch.cuda.is_bf16_supported():
            precision = "bf16"
        options["dtype"] = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": "auto"}[precision]
    kind = AutoModelForCausalLM if head else AutoModel
    try:
        model = kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {name!r} cannot be loaded: {error}") from None
    except (ImportError, RuntimeError, NotImplementedError) as error:
        if not eight_bit:
            raise
        raise ConfigError(f"--load_in_8bit: bitsandbytes does not run on {device} here ({error})") from None
    if not eight_bit:
        nn.Module.to(model, device)
    return model.eval()


def load_tokenizer(name: str, revision: str | None = None, token: str | None = None) -> Any:
    """The tokenizer beside a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of {name!r} cannot be loaded: {error}") from None


def load_rows(
    name: str,
    model: str,
    *,
    split: str = "train",
    ctx_len: int = 2048,
    max_examples: int | None = None,
    text_column: str = "text",
    shuffle_seed: int | None = 42,
    num_proc: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """Token rows from a ``.bin`` memory map, a text or table file, a saved dataset's folder, or the Hub.

    Rows that already have ``input_ids`` are taken as they are. Everything but a memory map or a stream is shuffled.
    """
    check_whole("ctx_len", ctx_len, 1)
    if max_examples is not None:
        check_whole("max_examples", max_examples, 1)
    _refuse_ignored(name, split, arguments)
    if name.endswith(".bin"):
        return MemmapDataset(name, ctx_len, max_examples)
    data = _load_dataset(name, split, dict(arguments or {}), text_column, token)
    streamed = not hasattr(data, "__len__")
    if "input_ids" in (data.column_names or ()):
        longest = 0 if streamed or not len(data) else len(data[0]["input_ids"])
        if longest > ctx_len:
            raise DataError(f"{name!r} has rows of {longest} tokens, longer than ctx_len={ctx_len}: raise --ctx_len")
    else:
        data = _tokenized(data, load_tokenizer(model, revision, token), name, ctx_len, num_proc, text_column)
    if streamed:
        if max_examples is None:
            raise DataError("a stream has no length, so the schedule needs one: set --max_examples")
        return StreamedRows(data, max_examples)
    if shuffle_seed is not None:
        data = data.shuffle(seed=shuffle_seed)
    data = data.with_format("torch", columns=["input_ids"])
    return data if max_examples is None else data.select(range(min(max_examples, len(data))))


def _tokenized(data: Any, tokenizer: Any, name: str, ctx_len: int, num_proc: int | None, text_column: str) -> Any:
    """`chunk_and_tokenize`, in the command line's words."""
    if data.column_names is not None and text_column not in data.column_names:
        raise DataError(
            f"{name!r} has no column {text_column!r}, only {', '.join(data.column_names)}: set --text_column"
        )
    try:
        return chunk_and_tokenize(data, tokenizer, max_seq_len=ctx_len, num_proc=num_proc, text_key=text_column)
    except TooShortError as error:
        fault = str(error).partition(":")[0]
        raise DataError(f"{name!r}: {fault}: lower --ctx_len, or give more text") from None


def _refuse_ignored(name: str, split: str, arguments: Mapping[str, Any] | None) -> None:
    path = Path(name)
    saved = path.is_dir() and any((path / each).exists() for each in ("state.json", "dataset_dict.json"))
    if arguments and (saved or path.suffix in (".bin", ".txt")):
        raise ConfigError(
            f"data_args are arguments of load_dataset, which {name!r} does not pass through: leave them out"
        )
    if split != "train" and (path.suffix in (".bin", ".txt") or (path / "state.json").exists()):
        raise ConfigError(f"split={split!r}: {name!r} has no splits: leave it out")


def _load_dataset(name: str, split: str, arguments: dict[str, Any], text_column: str, token: str | None) -> Any:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    suffixes = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.is_file() and path.suffix == ".txt":
        return Dataset.from_dict({text_column: list(documents(path))})
    try:
        if path.is_file() and path.suffix in suffixes:
            return load_dataset(suffixes[path.suffix], data_files=str(path), split=split, **arguments)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = load_from_disk(name)
            return saved[split] if isinstance(saved, DatasetDict) else saved
        return load_dataset(name, split=split, token=token, **arguments)
    except (OSError, ValueError, KeyError, ImportError, StopIteration) as error:
        # An empty file makes datasets stop an iterator without a word.
        reason = str(error) or "it holds no rows"
        raise DataError(f"the dataset {name!r} (split {split!r}) cannot be loaded: {reason}") from None


def special_ids(model: str, revision: str | None = None, token: str | None = None) -> list[int]:
    """The ids of bos, eos, padding and their kind."""
    return sorted(load_tokenizer(model, revision, token).all_special_ids)


def pick_device(asked: str | None, local_rank: int = 0) -> str:
    """The device asked for, or the best there is.

    Raises:
        ConfigError: the device asked for is not one, or is not here.
    """
    if asked:
        try:
            torch.empty(0, device=asked)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device={asked!r} cannot be used ({reason}): leave it out, or say cpu") from None
        return asked
    if torch.cuda.is_available():
        return f"cuda:{local_rank}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def parameters(model: nn.Module) -> int:
    """How many numbers a module learned."""
    return sum(p.numel() for p in model.parameters())


def _need_bitsandbytes() -> None:
    from importlib.util import find_spec

    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise ConfigError(f"--load_in_8bit needs the {package} package: install it, or leave the option out")
