"""Text to rows of token ids, and rows from wherever they are: datasets, memory maps, tensors, streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsify._errors import DataError, check_whole

T = TypeVar("T", Dataset, DatasetDict, IterableDataset)


class TooShortError(DataError):
    """A text that does not fill one row."""


def chunk_and_tokenize(
    data: T,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "torch",
    num_proc: int | None = None,
    text_key: str = "text",
    max_seq_len: int = 2048,
    return_final_batch: bool = False,
    load_from_cache_file: bool = True,
) -> T:
    """Rows of exactly ``max_seq_len`` tokens: documents joined by the eos token, which also comes first.

    >>> tokenized = chunk_and_tokenize(dataset, tokenizer, max_seq_len=256)  # doctest: +SKIP

    Documents are joined in groups of 2,048; the tail of a group that fills no row is dropped, unless
    ``return_final_batch`` keeps it as a short row. Streams (IterableDataset) work as well.

    Args:
        data: one or several splits with a text column named ``text_key``.
        max_seq_len: row length; the tokenizer's own maximum, where lower, wins.
        num_proc: processes that tokenize; None tokenizes in this one.

    Raises:
        DataError: the column is missing, or the text is too short to fill a single row.
    """
    check_whole("max_seq_len", max_seq_len, 1)
    length = min(tokenizer.model_max_length, max_seq_len)
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(f"the tokenizer {tokenizer.name_or_path!r} has no eos token to put between documents")

    def rows(texts: Mapping[str, Sequence[str]]) -> dict[str, list[list[int]]]:
        ids: list[int] = []
        for document in tokenizer(list(texts[text_key]), add_special_tokens=False, verbose=False)["input_ids"]:
            ids.append(eos)
            ids.extend(cast(list[int], document))
        whole = len(ids) if return_final_batch else len(ids) // length * length
        return {"input_ids": [ids[s : s + length] for s in range(0, whole, length)]}

    for columns in _columns(data):
        if columns is not None and text_key not in columns:
            raise DataError(f"the dataset has no column {text_key!r}, only {', '.join(columns)}: set text_key")
    names = next(iter(_columns(data)))
    if isinstance(data, IterableDataset):
        return data.map(rows, batched=True, batch_size=2048, remove_columns=names).with_format(format)
    # One process means none: a pool of one only costs its start.
    workers = {
        "num_proc": num_proc if num_proc and num_proc > 1 else None,
        "load_from_cache_file": load_from_cache_file,
    }
    made: Any = data.map(rows, batched=True, batch_size=2048, remove_columns=names, **workers)
    for split in made.values() if isinstance(made, DatasetDict) else [made]:
        if not len(split):
            raise TooShortError(
                f"the text is too short to fill one row of {length} tokens: lower max_seq_len, give more text, "
                "or keep the short row with return_final_batch=True"
            )
    return cast(T, made.with_format(format, columns=["input_ids"]))


def _columns(data: Dataset | DatasetDict | IterableDataset) -> list[list[str] | None]:
    names = data.column_names
    return list(names.values()) if isinstance(names, dict) else [names]


class MemmapDataset:
    """Rows of ``ctx_len`` tokens in a flat file of unsigned integers, as GPT-NeoX writes them; nothing is read early.

    >>> MemmapDataset("pile.bin", ctx_len=2048)[0]["input_ids"].shape  # doctest: +SKIP
    torch.Size([2048])
    """

    def __init__(self, data_path: str | Path, ctx_len: int, max_examples: int | None = None, dtype: Any = np.uint16):
        check_whole("ctx_len", ctx_len, 1)
        flat = _memory_map(Path(data_path), np.dtype(dtype))
        if len(flat) < ctx_len:
            raise DataError(f"{data_path} holds {len(flat)} tokens, not enough for one row of {ctx_len}")
        self.mmap = flat[: len(flat) // ctx_len * ctx_len].reshape(-1, ctx_len)[:max_examples]

    def __len__(self) -> int:
        return len(self.mmap)

    def __getitem__(self, index: int | slice) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self.mmap[index].astype(np.int64))}

    def select(self, rows: range) -> MemmapDataset:
        """The rows of a range."""
        part = MemmapDataset.__new__(MemmapDataset)
        part.mmap = self.mmap[rows.start : rows.stop : rows.step]
        return part

    def shard(self, num_shards: int, shard_id: int) -> MemmapDataset:
        """One of ``num_shards`` contiguous parts."""
        part = MemmapDataset.__new__(MemmapDataset)
        part.mmap = np.array_split(self.mmap, num_shards)[shard_id]
        return part


def _memory_map(path: Path, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise DataError(
            f"{path} has {size} bytes, which is no whole number of {8 * dtype.itemsize}-bit token ids: "
            "it is torn, or no memory map of tokens"
        )
    return np.memmap(path, dtype=dtype, mode="r")


class StreamedRows:
    """A stream read forwards as if it had an index: ``num_rows`` of its rows, in its order.

    >>> rows = StreamedRows(chunk_and_tokenize(stream, tokenizer), num_rows=10_000)  # doctest: +SKIP

    The rows read last are kept, so the same slice can be taken again. Going further back opens the stream anew, so a
    resumed run skips to its place and reads the same rows.
    """

    def __init__(self, stream: Iterable[Mapping[str, Any]], num_rows: int) -> None:
        self.stream, self.num_rows = stream, num_rows
        self._open()

    def _open(self) -> None:
        self._iterator, self._start, self._kept = iter(self.stream), 0, list[Mapping[str, Any]]()

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: slice) -> dict[str, Tensor]:
        start, stop, _ = index.indices(self.num_rows)
        if start < self._start:
            self._open()
        if self.available(stop, start) < stop:
            raise DataError(f"{self.end()}: lower max_examples to that")
        rows = [torch.as_tensor(row["input_ids"]) for row in self._kept[: stop - start]]
        return {"input_ids": _stacked(rows, start)}

    def available(self, stop: int, start: int = 0) -> int:
        """How many of the first ``stop`` rows there are; those from ``start`` on are read and kept."""
        stop = min(stop, self.num_rows)
        if stop <= self._start:
            return stop
        self._drop(start)
        for row in islice(self._iterator, max(0, stop - self._start - len(self._kept))):
            self._kept.append(row)
        return min(stop, self._start + len(self._kept))

    def end(self) -> str:
        """What to say where the stream has ended early."""
        there = self.available(self.num_rows, self.num_rows)
        return f"the stream ended after {there} of its {self.num_rows} rows"

    def _drop(self, start: int) -> None:
        """Forget the rows before ``start``, those not yet read among them."""
        if start <= self._start:
            return
        kept = min(start - self._start, len(self._kept))
        self._kept, self._start = self._kept[kept:], self._start + kept
        self._start += sum(1 for _ in islice(self._iterator, start - self._start))


def token_rows(dataset: Any, start: int, stop: int) -> Tensor:
    """Rows start to stop as one (rows, tokens) tensor of ids, or of whatever shape where they are real numbers.

    Takes a Hugging Face dataset, a MemmapDataset, StreamedRows, a (rows, tokens) tensor, or a list of either dicts
    with ``input_ids`` or sequences of ids.
    """
    part = dataset[start:stop]
    rows = part["input_ids"] if isinstance(part, Mapping) else part
    if isinstance(rows, Tensor):
        return _numbers(rows)
    return _stacked([torch.as_tensor(row["input_ids"] if isinstance(row, Mapping) else row) for row in rows], start)


def _stacked(rows: Sequence[Tensor], start: int) -> Tensor:
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise DataError(
            f"rows {start} to {start + len(rows)} have {sorted(lengths)} tokens; all rows must be equally long: "
            "use chunk_and_tokenize, and not return_final_batch"
        )
    return _numbers(torch.stack(list(rows)))


def _numbers(rows: Tensor) -> Tensor:
    return rows if rows.is_floating_point() else rows.long()


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file: one per line, as in the seeds of many small corpora."""
    with path.open() as file:
        for line in file:
            if text := line.strip():
                yield text
