"""A trained model and real text: an SAE of the residual stream that explains it, within seconds."""

import json

import pytest
import torch
from datasets import Dataset

from sparsify import Sae, SaeConfig, TrainConfig, Trainer
from sparsify.data import chunk_and_tokenize, documents


@pytest.fixture(scope="module")
def stories(assets):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "llama-stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [d for d, _ in zip(documents(assets / "text" / "tinystories-0.9mb.txt"), range(1500))]
    tokenized = chunk_and_tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_seq_len=128)
    return AutoModelForCausalLM.from_pretrained(folder), tokenized


def test_training_explains_the_residual_stream(stories, tmp_path):
    model, tokenized = stories
    cfg = TrainConfig(SaeConfig(k=32, num_latents=1024), batch_size=8, layers=[2], save_dir=str(tmp_path), lr=3e-3)
    trainer = Trainer(cfg, tokenized.select(range(400)), model)
    trainer.fit()
    last = json.loads((tmp_path / "unnamed" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["fvu/layers.2"] < 0.12
    sae = Sae.load_many(str(tmp_path / "unnamed"), local=True)["layers.2"]
    with torch.inference_mode():
        hidden = model(tokenized[:2]["input_ids"], output_hidden_states=True).hidden_states[3].flatten(0, 1)
        fvu = float(sae(hidden).fvu)
    assert fvu < 0.15


def test_attention_and_mlp_transcoders_of_a_llama(stories, tmp_path):
    """Keyword-called attention and a projection with d_in ≠ d_out, which others cannot train."""
    model, tokenized = stories
    cfg = TrainConfig(
        SaeConfig(k=16, num_latents=256, transcode=True, skip_connection=True),
        batch_size=8,
        hookpoints=["layers.0.self_attn", "layers.1.mlp.down_proj"],
        save_dir=str(tmp_path),
        lr=1e-2,
    )
    trainer = Trainer(cfg, tokenized.select(range(160)), model)
    trainer.fit()
    down = trainer.saes["layers.1.mlp.down_proj"]
    assert (down.d_in, down.d_out) == (172, 64)
    last = json.loads((tmp_path / "unnamed" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["fvu/layers.1.mlp.down_proj"] < 0.5
    # Attention mixes tokens: a map of one token at a time can explain only part of it.
    assert last["fvu/layers.0.self_attn"] < 0.9
