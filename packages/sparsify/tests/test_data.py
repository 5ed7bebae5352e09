"""Rows of tokens: nothing lost but the tail, the same from every kind of store."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from sparsify import ConfigError, DataError
from sparsify.data import MemmapDataset, StreamedRows, chunk_and_tokenize, token_rows


@pytest.fixture
def tokenizer(assets):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "llama-stories260k")


TEXTS = ["Once upon a time there was a cat.", "The dog ran.", "They were happy and sad.", "A red ball."] * 5


def test_chunks_hold_every_token_but_the_tail(tokenizer):
    rows = chunk_and_tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer, max_seq_len=16)
    expected = [i for text in TEXTS for i in [2, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    got = rows[:]["input_ids"]
    assert isinstance(got, torch.Tensor)
    assert got.shape == (len(expected) // 16, 16)
    assert got.flatten().tolist() == expected[: len(expected) // 16 * 16]
    assert got[0, 0] == tokenizer.eos_token_id
    short = chunk_and_tokenize(Dataset.from_dict({"text": TEXTS}), tokenizer, max_seq_len=16, return_final_batch=True)
    assert sum(len(row) for row in short["input_ids"]) == len(expected)


def test_rows_are_no_longer_than_the_tokenizer_allows(tokenizer):
    many = Dataset.from_dict({"doc": TEXTS * 20})
    assert len(chunk_and_tokenize(many, tokenizer, text_key="doc")[0]["input_ids"]) == 512


def test_splits_streams_and_processes_agree(tokenizer):
    data = Dataset.from_dict({"text": TEXTS, "id": range(20)})
    plain = token_rows(chunk_and_tokenize(data, tokenizer, max_seq_len=16), 0, 5)
    splits = chunk_and_tokenize(DatasetDict(train=data, test=data), tokenizer, max_seq_len=16)
    stream = StreamedRows(chunk_and_tokenize(data.to_iterable_dataset(), tokenizer, max_seq_len=16), num_rows=8)
    assert torch.equal(token_rows(splits["test"], 0, 5), plain)
    assert torch.equal(token_rows(stream, 0, 5), plain)
    assert torch.equal(token_rows(stream, 3, 5), plain[3:])
    with pytest.raises(DataError, match=r"ended after \d+ of its 4000 rows: lower max_examples"):
        token_rows(StreamedRows(stream.stream, 4000), 3990, 4000)


def test_a_stream_is_read_on_from_where_a_run_resumes(tokenizer, tmp_path):
    """A resumed run opens the stream anew, skips to its place and ends with the same bits."""
    from small import Tiny

    from sparsify import SaeConfig, TrainConfig, Trainer

    def rows():
        stream = Dataset.from_dict({"text": TEXTS * 4}).to_iterable_dataset()
        return StreamedRows(chunk_and_tokenize(stream, tokenizer, max_seq_len=16), num_rows=24)

    shared = {"batch_size": 2, "hookpoints": ["layers.1"], "save_every": 4, "buffer_batches": 3}
    found = []
    for stops in ([12], [5, 12]):
        cfg = TrainConfig(SaeConfig(k=4, num_latents=48), save_dir=str(tmp_path), run_name=f"{len(stops)}", **shared)
        for stop in stops:
            trainer = Trainer(cfg, rows(), Tiny(vocabulary=512))
            if stop != stops[0]:
                trainer.load_state()
                assert trainer.global_step == 4
            while trainer.global_step < stop:
                trainer.step()
                if trainer.global_step == 4:
                    trainer.save()
        found.append(trainer.saes["layers.1"].state_dict())
    assert trainer.total_steps == 12
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_every_store_gives_the_same_rows(tmp_path):
    ids = torch.arange(60).view(10, 6)
    np.arange(60, dtype=np.uint16).tofile(tmp_path / "a.bin")
    memmap = MemmapDataset(tmp_path / "a.bin", 6)
    stores = [ids, ids.tolist(), [{"input_ids": r} for r in ids.tolist()], memmap]
    stores += [
        Dataset.from_dict({"input_ids": ids.tolist()}),
        Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"),
    ]
    for store in stores:
        assert torch.equal(token_rows(store, 2, 5), ids[2:5])
    assert len(MemmapDataset(tmp_path / "a.bin", 7)) == 8
    assert torch.equal(memmap.select(range(3, 6))[0]["input_ids"], ids[3])
    assert len(memmap.shard(3, 2)) == 3


def test_bad_text_is_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no column 'text', only body"):
        chunk_and_tokenize(Dataset.from_dict({"body": TEXTS}), tokenizer)
    with pytest.raises(DataError, match="too short to fill one row of 512 tokens"):
        chunk_and_tokenize(Dataset.from_dict({"text": TEXTS[:2]}), tokenizer)
    (tmp_path / "a.bin").write_bytes(b"12")
    with pytest.raises(DataError, match="1 tokens, not enough"):
        MemmapDataset(tmp_path / "a.bin", 6)


def test_options_that_a_dataset_cannot_follow(tmp_path):
    from sparsify._load import load_rows

    (tmp_path / "a.bin").write_bytes(bytes(200))
    (tmp_path / "a.txt").write_text("words")
    Dataset.from_dict({"input_ids": [[1, 2, 3, 4]]}).save_to_disk(tmp_path / "saved")
    for name, options, message in [
        ("a.bin", {"arguments": {"streaming": True}}, "arguments of load_dataset"),
        ("a.txt", {"split": "test"}, "has no splits"),
        ("saved", {"arguments": {"n": 1}}, "arguments of load_dataset"),
        ("saved", {"split": "validation"}, "has no splits"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_rows(str(tmp_path / name), "model", ctx_len=4, **options)
    with pytest.raises(DataError, match=r"rows of 4 tokens, longer than ctx_len=2"):
        load_rows(str(tmp_path / "saved"), "model", ctx_len=2)
