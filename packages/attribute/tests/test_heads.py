"""Attention heads as columns of their own, and an output embedding that differs."""

from __future__ import annotations

import pytest
import torch

from attribute import Asker, Attributor, IndexConfig, QueryConfig, RunError, collect_gradients
from gradcore import AttentionConfig


def test_heads_are_columns_and_sum_up_to_the_module(make_model, tokenizer, documents, tmp_path):
    model = make_model("gpt2")
    width, heads = model.config.n_embd, model.config.n_head
    records = [{"text": text} for text in documents[:6]]
    config = IndexConfig(projection_dim=0)
    whole = collect_gradients(model, records, tmp_path / "whole", tokenizer=tokenizer, config=config)
    split = collect_gradients(
        model,
        records,
        tmp_path / "split",
        tokenizer=tokenizer,
        config=config,
        attention_cfgs={
            "h.*.attn.c_proj": AttentionConfig(num_heads=heads, head_size=width // heads, head_dim=2, side="in")
        },
    )
    names = [f"h.0.attn.c_proj.head_{head}" for head in range(heads)]
    assert set(names) <= set(split.columns)
    parts = [split.block(0, 6, modules=[name]).reshape(6, width, width // heads) for name in names]
    joined = torch.cat([torch.from_numpy(part) for part in parts], dim=2)
    expected = torch.from_numpy(whole.block(0, 6, modules=["h.0.attn.c_proj"])).reshape(6, width, width)
    torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-7)
    # Heads are chosen by name, and their scores differ from the whole's.
    attributor = Attributor(split, unit_norm=True)
    found = attributor.search(split.block(2, 3), 6, modules="*.head_0")
    assert found.indices[0, 0] == 2


def test_another_output_embedding_is_refused(make_model, tokenizer, documents, tmp_path):
    model = make_model("gpt_neox")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = IndexConfig(model=str(tmp_path / "model"))
    collect_gradients(
        model, [{"text": text} for text in documents[:4]], tmp_path / "run", tokenizer=tokenizer, config=config
    )
    assert len(Asker.open(tmp_path / "run").ask([{"text": documents[1]}], QueryConfig(top_k=1))) == 1
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match="another output embedding"):
        Asker.open(tmp_path / "run", model=str(tmp_path / "other"))


def test_heads_are_split_by_a_pattern_alone(make_model, tokenizer, documents, tmp_path):
    """What ``--split-attention-modules`` does, with the heads read off the model's configuration."""
    model, records = make_model("llama"), [{"text": text} for text in documents[:4]]
    config = IndexConfig(projection_dim=0, split_attention_modules=("*.o_proj",))
    store = collect_gradients(model, records, tmp_path / "run", tokenizer=tokenizer, config=config)
    heads = model.config.num_attention_heads
    assert [name for name in store.columns if "layers.0.self_attn.o_proj" in name] == [
        f"layers.0.self_attn.o_proj.head_{head}" for head in range(heads)
    ]
    assert "layers.0.self_attn.q_proj" in store.columns
