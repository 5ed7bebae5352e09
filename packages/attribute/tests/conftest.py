"""Tiny models of three architectures and a tokenizer, made on the spot; nothing here touches a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

VOCABULARY = 300
CONTEXT = 48
ARCHITECTURES = ("gpt2", "llama", "gpt_neox")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}"
    "{% if turn['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Merges that the tests rely on: "the" is one token, so a border inside it is straddled.
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("i", "n"), ("Ġ", "a")]


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


def make_tokenizer(*, bos: bool = False) -> Any:
    """Byte-level BPE with a handful of merges; with ``bos`` every text begins with ``<s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(architecture: str, seed: int = 0, **options: Any) -> Any:
    """A model of a few thousand parameters in training mode with dropout on, its weights large enough to matter."""
    import torch
    import transformers as hf

    width, layers, heads = 16, 2, 2
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    llama_like = {
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CONTEXT,
        **common,
    }
    configurations: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: hf.GPT2Config(
            n_embd=width, n_layer=layers, n_head=heads, n_positions=CONTEXT, **common, **options
        ),
        "llama": lambda: hf.LlamaConfig(num_key_value_heads=1, attention_dropout=0.1, **llama_like, **options),
        "gpt_neox": lambda: hf.GPTNeoXConfig(hidden_dropout=0.1, **llama_like, **options),
        "gemma2": lambda: hf.Gemma2Config(
            num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, **llama_like, **options
        ),
        "cohere": lambda: hf.CohereConfig(num_key_value_heads=1, **llama_like, **options),
    }
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(configurations[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
            elif architecture != "gemma2":  # whose norms add one to their weights
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_model(folder: Path, architecture: str, seed: int = 0, *, bos: bool = False, **options: Any) -> Path:
    make_model(architecture, seed, **options).save_pretrained(folder)
    make_tokenizer(bos=bos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", name="make_model")
def _make_model() -> Callable[..., Any]:
    return make_model


@pytest.fixture(scope="session", name="save_model")
def _save_model() -> Callable[..., Path]:
    return save_model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture → folder of a saved model; ``gpt2-other`` has the shape of ``gpt2`` and other weights."""
    root = tmp_path_factory.mktemp("models")
    made = {name: save_model(root / name, name) for name in ARCHITECTURES}
    return {**made, "gpt2-other": save_model(root / "gpt2-other", "gpt2", seed=1)}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Forty texts of 2 to about 45 tokens, deterministic and all different."""
    words = [
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
    texts = []
    for number in range(40):
        count = 1 + (number * 7) % 11
        text = " ".join(words[(number * 5 + place * (3 + number % 4)) % len(words)] for place in range(count))
        texts.append(f"{text[:40]} {number}")
    return texts


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models and texts, where a checkout has them beside it."""
    root = next(parent for parent in Path(__file__).resolve().parents if (parent / "uv.lock").exists())
    folder = Path(os.environ.get("TRACE_ASSETS") or root.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip("no assets: TRACE_ASSETS is not set and ../shared/assets is absent")
    return folder
