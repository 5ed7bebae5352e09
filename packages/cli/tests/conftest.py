"""A tiny model, a dataset and the program called as a person calls it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

CONTEXT = 32
WORDS = [
    "the",
    "sea",
    "and",
    "a",
    "hill",
    "in",
    "rain",
    "over",
    "old",
    "towns",
    "where",
    "nine",
    "bakers",
    "keep",
    "lamps",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread costs more than it does. For the fixtures of modules, too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    import torch

    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def save_model(folder: Path, architecture: str = "gpt_neox", seed: int = 0) -> Path:
    """A model with a tokenizer of one token a byte."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(pieces),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    configuration = {"gpt_neox": hf.GPTNeoXConfig, "llama": hf.LlamaConfig}[architecture](**options)
    hf.AutoModelForCausalLM.from_config(configuration).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "neox": save_model(root / "neox"),
        "other": save_model(root / "other", seed=1),
        "llama": save_model(root / "llama", "llama"),
    }


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [
        " ".join(WORDS[(number + place * 5) % len(WORDS)] for place in range(1 + number % 6)) for number in range(30)
    ]


@pytest.fixture(scope="session")
def dataset(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def trace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The program in this process: what it printed and the code it left with."""
    from trace_cli.main import main

    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(each) for each in arguments])
        printed = capsys.readouterr()
        code = done.value.code
        return Result(code if isinstance(code, int) else 0, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def build_options(models: dict[str, Path], dataset: Path) -> list[str]:
    return ["--model", str(models["neox"]), "--dataset", str(dataset), "--truncation", "--projection-dim", "4"]


@pytest.fixture(scope="session")
def index(build_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes; `copy_of_index` is for those that do."""
    from trace_cli.main import main

    path = tmp_path_factory.mktemp("index") / "run"
    with pytest.raises(SystemExit) as done:
        main(["build", str(path), *build_options])
    assert done.value.code == 0
    return path


@pytest.fixture
def copy_of_index(index: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(index, tmp_path / "copy"))


def folder_contents(path: Path) -> dict[str, bytes]:
    """Every file but the saved command and the lock."""
    files = (each for each in sorted(path.rglob("*")) if each.is_file())
    return {
        each.relative_to(path).as_posix(): each.read_bytes()
        for each in files
        if each.name not in ("config.yaml", "writer.lock")
    }


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    return folder_contents
