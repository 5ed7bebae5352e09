"""Every line of the seeds' README, verbatim; only the names of models and datasets lead to tiny ones."""

import shlex

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from small import token_rows
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from sparsify import Sae, SaeConfig, TrainConfig, Trainer
from sparsify.cli import sae

HUB = "EleutherAI/sae-pythia-160m-32x"
# Program and launcher first: torchrun is what starts several of the same, see test_distributed.
COMMANDS = """
python -m sparsify EleutherAI/pythia-160m
python -m sparsify EleutherAI/pythia-160m --transcode
python -m sparsify EleutherAI/pythia-160m togethercomputer/RedPajama-Data-1T-Sample --finetune EleutherAI/sae-pythia-160m-32x
python -m sparsify gpt2 --hookpoints "h.*.attn" "h.*.mlp.act"
python -m sparsify gpt2 --hookpoints "h.[012].attn" "h.[012].mlp.act"
torchrun --nproc_per_node gpu -m sparsify meta-llama/Meta-Llama-3-8B --batch_size 1 --layers 16 24 --k 192 --grad_acc_steps 8 --ctx_len 2048
torchrun --nproc_per_node gpu -m sparsify meta-llama/Meta-Llama-3-8B --distribute_modules --batch_size 1 --layer_stride 2 --grad_acc_steps 8 --ctx_len 2048 --k 192 --load_in_8bit --micro_acc_steps 2
python -m sparsify gpt2 --hookpoints "h.*.attn" "h.*.mlp.act" --k_decay_steps 10_000
python -m sparsify gpt2 --hookpoints "h.*.attn" "h.*.mlp.act" --activation groupmax
python -m sparsify gpt2 --hookpoints "h.*.attn" "h.*.mlp.act" --loss_fn ce
python -m sparsify gpt2 --hookpoints "h.*.attn" "h.*.mlp.act" --loss_fn kl
""".strip().splitlines()  # noqa: E501


def tiny(name):
    shape = {"vocab_size": 30, "max_position_embeddings": 64}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=64, n_embd=8, n_layer=4, n_head=2))
    wide = {**shape, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    if "pythia" in name:
        return GPTNeoXForCausalLM(GPTNeoXConfig(**wide, num_hidden_layers=2))
    return LlamaForCausalLM(LlamaConfig(**wide, num_key_value_heads=2, num_hidden_layers=26))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where names lead: coders to a folder, models to tiny ones, datasets to a few rows."""
    monkeypatch.chdir(tmp_path)
    asked = {}

    def load_model(name, *, head, eight_bit, **options):
        asked.update(name=name, eight_bit=eight_bit)
        model = tiny(name).eval()
        return model if head else model.base_model

    def load_rows(dataset, model, **options):
        asked.update(dataset=dataset, ctx_len=options["ctx_len"])
        return token_rows(8 if "llama" in model else 32, 6)

    monkeypatch.setattr("sparsify._load.load_model", load_model)
    monkeypatch.setattr("sparsify._load.load_rows", load_rows)
    monkeypatch.setattr("sparsify._files.snapshot_download", lambda name, **_: str(tmp_path / name))
    return asked


EXPECTED = {
    "pythia": ["layers.0", "layers.1"],
    '"h.*': [f"h.{i}.{m}" for i in range(4) for m in ("attn", "mlp.act")],
    '"h.[012]': [f"h.{i}.{m}" for i in range(3) for m in ("attn", "mlp.act")],
    "--layers 16 24": ["layers.16", "layers.24"],
    "--layer_stride 2": [f"layers.{i}" for i in range(0, 26, 2)],
}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line, hub, tmp_path):
    words = shlex.split(line.partition("-m sparsify ")[2])
    if "--finetune" in words:
        cfg = TrainConfig(SaeConfig(), batch_size=8, save_dir=".", run_name=HUB)
        Trainer(cfg, token_rows(8, 6), tiny("pythia")).fit()
    result = CliRunner().invoke(sae, ["train", *words])
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = Sae.load_many("checkpoints/unnamed", local=True)
    assert list(found) == next(hooks for part, hooks in EXPECTED.items() if part in line)
    assert hub["name"] == words[0]
    assert hub["ctx_len"] == 2048
    assert hub["eight_bit"] == ("--load_in_8bit" in words)
    named = len(words) > 1 and not words[1].startswith("--")
    assert hub["dataset"] == (words[1] if named else "EleutherAI/SmolLM2-135M-10B")
    first = next(iter(found.values()))
    assert first.num_latents == 32 * first.d_in
    assert first.cfg.activation == ("groupmax" if "groupmax" in words else "topk")
    assert first.cfg.transcode == ("--transcode" in words)


LOADING = """
from sparsify import Sae

sae = Sae.load_from_hub("EleutherAI/sae-llama-3-8b-32x", hookpoint="layers.10")

saes = Sae.load_many("EleutherAI/sae-llama-3-8b-32x")
saes["layers.10"]

from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

tokenizer = AutoTokenizer.from_pretrained("meta-llama/Meta-Llama-3-8B")
inputs = tokenizer("Hello, world!", return_tensors="pt")

with torch.inference_mode():
    model = AutoModelForCausalLM.from_pretrained("meta-llama/Meta-Llama-3-8B")
    outputs = model(**inputs, output_hidden_states=True)

    latent_acts = []
    for sae, hidden_state in zip(saes.values(), outputs.hidden_states):
        # (N, D) input shape expected
        hidden_state = hidden_state.flatten(0, 1)
        latent_acts.append(sae.encode(hidden_state))
"""
TRAINING = """
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsify import SaeConfig, Trainer, TrainConfig
from sparsify.data import chunk_and_tokenize

MODEL = "HuggingFaceTB/SmolLM2-135M"
dataset = load_dataset(
    "EleutherAI/SmolLM2-135M-10B", split="train",
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenized = chunk_and_tokenize(dataset, tokenizer)


gpt = AutoModelForCausalLM.from_pretrained(
    MODEL,
    device_map={"": "cuda"},
    torch_dtype=torch.bfloat16,
)

cfg = TrainConfig(SaeConfig(), batch_size=16)
trainer = Trainer(cfg, tokenized, gpt)

trainer.fit()
"""


@pytest.fixture
def auto(hub, assets, monkeypatch):
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "llama-stories260k")
    tokenizer.model_max_length = 16
    wide = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    cfg = LlamaConfig(**wide, num_hidden_layers=12, vocab_size=512, max_position_embeddings=64)

    def from_pretrained(name, device_map=None, torch_dtype=torch.float32):
        return LlamaForCausalLM(cfg).to(torch_dtype)  # there may be no "cuda" here

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    texts = [f"Once upon a time there was a dog called {n} who liked the sun." for n in range(60)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: Dataset.from_dict({"text": texts}))


def test_loading_and_encoding(auto, tmp_path):
    for name in ["embed_tokens", *(f"layers.{i}" for i in range(12))]:
        Sae(8, SaeConfig()).save_to_disk(tmp_path / "EleutherAI/sae-llama-3-8b-32x" / name)
    names: dict = {}
    exec(LOADING, names)
    assert list(names["saes"]) == ["embed_tokens", *(f"layers.{i}" for i in range(12))]
    ids = names["inputs"]["input_ids"]
    assert [tuple(out.top_acts.shape) for out in names["latent_acts"]] == [(ids.numel(), 32)] * 13
    assert names["latent_acts"][0][1].max() < 256


def test_training_in_python(auto):
    names: dict = {}
    exec(TRAINING, names)
    assert list(Sae.load_many("checkpoints/unnamed", local=True)) == [f"layers.{i}" for i in range(12)]
    assert names["trainer"].global_step >= 1
