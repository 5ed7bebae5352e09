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
    for content, message in [
        (b"", "0 bytes, which is no whole number of 16-bit"),
        (b"123", "3 bytes"),
        (None, "no file"),
    ]:
        (tmp_path / "a.bin").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(DataError, match=message):
            MemmapDataset(tmp_path / "a.bin", 6)


class Counted:
    """A stream that counts what is read of it."""

    def __init__(self, rows):
        self.rows, self.read = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield {"input_ids": row}


def test_a_stream_is_read_once_a_pass(tmp_path):
    from small import Tiny

    from sparsify import SaeConfig, SparseCoder, build_cache, evaluate, top_contexts

    ids = torch.randint(30, (64, 6))
    stream = Counted(ids)
    rows = StreamedRows(stream, 64)
    build_cache(tmp_path, Tiny(), rows, ["layers.1"], batch_size=4)
    assert stream.read == 64
    stream.read = 0
    evaluate(Tiny(), {"layers.1": SparseCoder(12, SaeConfig(k=4))}, rows, batch_size=4)
    top_contexts(Tiny(), {"layers.1": SparseCoder(12, SaeConfig(k=4))}, rows, batch_size=4)
    assert stream.read < 4 * 64 + 64
    assert torch.equal(token_rows(rows, 60, 64), ids[60:])
    assert torch.equal(token_rows(rows, 8, 12), ids[8:12])


def test_a_stream_that_ends_early_ends_the_work_and_loses_none(tmp_path):
    from small import Tiny

    from sparsify import SaeConfig, SparsifyWarning, TrainConfig, Trainer, build_cache, evaluate

    ids = torch.randint(30, (26, 6))
    whole = TrainConfig(
        SaeConfig(k=4, num_latents=48), batch_size=4, hookpoints=["layers.1"], save_dir=str(tmp_path), log_every=4
    )
    for resumed in (False, True):
        trainer = Trainer(whole, StreamedRows(Counted(ids), 40), Tiny())
        if resumed:
            trainer.load_state()
        with pytest.warns(SparsifyWarning, match="ended after 26 of its 40 rows, so the run ends at step 6 of its"):
            trainer.fit()
        assert trainer.global_step == 6
        assert len((tmp_path / "unnamed" / "metrics.jsonl").read_text().splitlines()) == 2
        assert (tmp_path / "unnamed" / "layers.1" / "sae.safetensors").exists()
    with pytest.warns(SparsifyWarning, match="so the cache holds 6 batches"):
        assert len(build_cache(tmp_path / "c", Tiny(), StreamedRows(Counted(ids), 40), ["layers.1"], batch_size=4)) == 6
    with pytest.warns(SparsifyWarning, match="judged"):
        result = evaluate(Tiny(), trainer.saes, StreamedRows(Counted(ids), 40), batch_size=4)
    assert result.tokens == 26 * 6
    assert result.reconstruction == evaluate(Tiny(), trainer.saes, ids, batch_size=4).reconstruction
    with pytest.raises(DataError, match="ended after 2 of its 40 rows: lower max_examples"):
        Trainer(whole, StreamedRows(Counted(ids[:2]), 40), Tiny()).fit()


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
