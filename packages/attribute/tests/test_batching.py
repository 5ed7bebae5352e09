"""Batches: every row once, the budget held, and the token file gives back what was put in."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attribute import DataError
from attribute.batching import assemble, plan_batches
from attribute.data import Row, TokenFile, TokenFileWriter

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
ROWS = st.lists(st.lists(st.integers(0, 299), max_size=12), max_size=12)


def write(folder: Path, ids: list[list[int]], vocabulary: int = 300) -> TokenFile:
    rows = [
        Row(np.array(each, dtype=np.int64), np.array([place % 3 > 0 for place in range(len(each))], dtype=bool), {})
        for each in ids
    ]
    return TokenFileWriter(folder, vocabulary).write(rows)


@given(LENGTHS, st.integers(1, 120))
def test_every_row_runs_once_within_the_budget(lengths, budget):
    batches = plan_batches(np.array(lengths, dtype=np.int64), np.arange(len(lengths)), budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        width = max(1, *(lengths[row] for row in batch)) if len(batch) else 1
        assert len(batch) == 1 or width * len(batch) <= budget
        assert len(batch) > 0


@given(LENGTHS, st.integers(1, 120))
def test_a_row_longer_than_the_budget_runs_alone(lengths, budget):
    for batch in plan_batches(np.array(lengths, dtype=np.int64), np.arange(len(lengths)), budget):
        assert len(batch) == 1 or all(lengths[row] <= budget for row in batch)


@given(LENGTHS, st.integers(1, 120), st.data())
def test_a_window_is_planned_without_its_neighbours(lengths, budget, data):
    """What comes before or after a shard changes nothing in it: a resumed run meets the same batches."""
    start = data.draw(st.integers(0, len(lengths)))
    stop = data.draw(st.integers(start, len(lengths)))
    inside = plan_batches(np.array(lengths, dtype=np.int64), np.arange(start, stop), budget)
    alone = plan_batches(np.array(lengths[start:stop], dtype=np.int64), np.arange(stop - start), budget)
    assert [batch.tolist() for batch in inside] == [(batch + start).tolist() for batch in alone]


@given(LENGTHS, st.integers(1, 120))
def test_no_two_neighbouring_batches_would_fit_in_one(lengths, budget):
    batches = plan_batches(np.array(lengths, dtype=np.int64), np.arange(len(lengths)), budget)
    for left, right in pairwise(batches):
        joined = max(1, *(lengths[row] for row in (*left, right[0]))) * (len(left) + 1)
        assert joined > budget


@settings(max_examples=50)
@given(ROWS, st.sampled_from([300, 1 << 16, (1 << 16) + 1]))
def test_the_token_file_gives_back_what_was_written(ids, vocabulary):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder), ids, vocabulary)
        for tokens in (written, TokenFile(Path(folder))):
            assert len(tokens) == len(ids)
            assert tokens.lengths.tolist() == [len(each) for each in ids]
            assert tokens.total == sum(map(len, ids))
            for row, each in enumerate(ids):
                assert tokens.ids(row).tolist() == each
                assert tokens.labelled(row).astype(bool).tolist() == [place % 3 > 0 for place in range(len(each))]
        assert TokenFile(Path(folder)).digest == written.digest


def test_large_token_ids_survive(tmp_path):
    ids = [[0, 65535, 65536, 151_935]]
    assert write(tmp_path, ids, vocabulary=151_936).ids(0).tolist() == ids[0]


def test_the_digest_sees_ids_labels_and_borders(tmp_path):
    digests = {
        write(tmp_path / str(n), ids).digest for n, ids in enumerate(([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]]))
    }
    assert len(digests) == 3
    rows = [Row(np.array([1, 2, 3]), np.array([False, True, last]), {}) for last in (True, False)]
    assert len({TokenFileWriter(tmp_path / f"r{n}", 9).write([row]).digest for n, row in enumerate(rows)}) == 2


@pytest.mark.parametrize("wrong", [300, -1])
def test_a_token_outside_the_vocabulary_is_named(wrong, tmp_path):
    with pytest.raises(DataError, match=rf"row 1 has token id {wrong}, the model knows 300: .*--tokenizer"):
        write(tmp_path, [[1, 2], [3, wrong]])


def test_an_unfinished_token_file_is_refused(tmp_path):
    write(tmp_path, [[1, 2]])
    (tmp_path / "tokens.json").unlink()
    with pytest.raises(DataError, match="no finished token file"):
        TokenFile(tmp_path)


def test_batches_are_padded_on_the_right_without_loss(tmp_path):
    tokens = write(tmp_path, [[7, 8, 9, 10], [11], [], [12, 13]])
    batch = assemble(tokens, [3, 0, 1, 2], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[12, 13, 0, 0], [7, 8, 9, 10], [11, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 13, -100, -100], [-100, 8, 9, -100], [-100] * 4, [-100] * 4]
    assert batch.tokens == 7
