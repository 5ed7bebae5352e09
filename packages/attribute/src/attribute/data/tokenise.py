"""Rendering records to rows: token ids, which of them carry loss, and the record that a hit shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from attribute._errors import DataError
from attribute.config import DataConfig
from attribute.data.sources import Source
from gradcore import IGNORE

Span = tuple[int, int]
_TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    is_fast: bool

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Token ids, and offsets where asked."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Text of token ids."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Text of a conversation."""
        ...


@dataclass(frozen=True)
class Row:
    """One row of a dataset as the model sees it.

    Attributes:
        ids: token ids ``[s]``.
        labelled: which tokens carry loss ``[s]``; the first never does, since nothing predicts it.
        record: the record's columns, its text narrowed to the chunk where documents are cut.
    """

    ids: np.ndarray
    labelled: np.ndarray
    record: dict[str, Any]


@dataclass(frozen=True)
class _Rendered:
    text: str
    ids: list[int]
    spans: list[Span] | None  # character span of each token, where the tokenizer knows them
    labelled: np.ndarray


def rows_of(source: Source, tokenizer: Any, config: DataConfig, context: int | None) -> Iterator[Row]:
    """The rows of a dataset, in its order: one a record, or one a chunk.

    Args:
        source: the opened dataset.
        tokenizer: the model's tokenizer.
        config: which columns, and whether to truncate or chunk.
        context: most tokens the model takes, ``None`` for any number.

    Raises:
        DataError: a missing column, a value that is not text, a document longer than the context when neither
            truncation nor chunking is chosen, a chunk length beyond the context.
    """
    if context is not None and config.chunk_length > context:
        raise DataError(f"--chunk-length {config.chunk_length} exceeds the model's context of {context} tokens")
    total = 0
    for number, (record, rendered) in enumerate(_rendered(source, tokenizer, config)):
        for row in _cut(number, record, rendered, tokenizer, config, context):
            yield row
            total += len(row.ids)
            if config.max_tokens and total >= config.max_tokens:
                return


def _rendered(source: Source, tokenizer: Tokenizer, config: DataConfig) -> Iterator[tuple[dict[str, Any], _Rendered]]:
    if "input_ids" in source.columns:
        render = _tokenised
    elif config.conversation_column:
        source.require(config.conversation_column)
        render = _conversations
    elif config.completion_column:
        source.require(config.prompt_column, config.completion_column)
        render = _completions
    else:
        source.require(config.prompt_column)
        render = _texts
    done = 0
    for records in source.batches():
        yield from zip(records, render(records, done, tokenizer, config))
        done += len(records)


def _tokenised(
    records: list[dict[str, Any]], done: int, tokenizer: Tokenizer | None, config: DataConfig
) -> Iterator[_Rendered]:
    for place, record in enumerate(records):
        ids = _integers(record.get("input_ids"), done + place, "input_ids")
        given = record.get("labels")
        labels = ids if given is None else _integers(given, done + place, "labels")
        if len(labels) != len(ids) or any(label not in (token, IGNORE) for token, label in zip(ids, labels)):
            raise DataError(f"row {done + place}: labels must be input_ids with {IGNORE} where no loss is")
        labelled = np.array([label != IGNORE for label in labels], dtype=bool)
        yield _Rendered("", ids, None, labelled)


def _texts(records: list[dict[str, Any]], done: int, tokenizer: Tokenizer, config: DataConfig) -> Iterator[_Rendered]:
    texts = [_text(record, config.prompt_column, done + place) for place, record in enumerate(records)]
    for text, ids, spans in _encode(texts, tokenizer):
        yield _Rendered(text, ids, spans, np.ones(len(ids), dtype=bool))


def _completions(
    records: list[dict[str, Any]], done: int, tokenizer: Tokenizer, config: DataConfig
) -> Iterator[_Rendered]:
    prompts = [_text(record, config.prompt_column, done + place) for place, record in enumerate(records)]
    endings = [_text(record, config.completion_column, done + place) for place, record in enumerate(records)]
    encoded = _encode([prompt + ending for prompt, ending in zip(prompts, endings)], tokenizer)
    for prompt, (text, ids, spans) in zip(prompts, encoded):
        if spans is not None:
            # A token that straddles the border belongs to the completion: it predicts some of it.
            labelled = np.array([end > len(prompt) for _, end in spans], dtype=bool)
        else:
            before = len(tokenizer(prompt, verbose=False)["input_ids"])
            labelled = np.arange(len(ids)) >= before
        yield _Rendered(text, ids, spans, labelled)


def _conversations(
    records: list[dict[str, Any]], done: int, tokenizer: Tokenizer, config: DataConfig
) -> Iterator[_Rendered]:
    for place, record in enumerate(records):
        turns = record.get(config.conversation_column)
        where = f"row {done + place}, column {config.conversation_column!r}"
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns
        ):
            raise DataError(f"{where} is not a list of turns with role and content")
        yield _conversation(turns, tokenizer, where)


def _conversation(turns: list[dict[str, Any]], tokenizer: Tokenizer, where: str) -> _Rendered:
    """Every assistant turn is labelled: what the template adds between "the assistant is to speak" and its end."""

    from jinja2 import TemplateError  # what a template raises that wants its turns otherwise

    def text_of(upto: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(turns[:upto], tokenize=False, add_generation_prompt=prompt)

    try:
        whole = text_of(len(turns), False)
        spoken: list[Span] = []
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            start, end = text_of(place, True), text_of(place + 1, False)
            if not (whole.startswith(start) and whole.startswith(end)):
                raise DataError(f"{where}: the chat template rewrites earlier turns, so assistant turns have no place")
            spoken.append((len(start), len(end)))
    except (ValueError, TemplateError) as error:
        raise DataError(f"{where}: {error}") from error
    # The template has written the special tokens already: a second set would shift everything.
    ((text, ids, spans),) = _encode([whole], tokenizer, add_special_tokens=False)
    if spans is None:
        raise DataError("--conversation-column needs a fast tokenizer, which knows where its tokens stand")
    labelled = np.array([any(start < b and end > a for a, b in spoken) for start, end in spans], dtype=bool)
    return _Rendered(text, ids, spans, labelled)


def _encode(
    texts: list[str], tokenizer: Tokenizer, add_special_tokens: bool = True
) -> Iterator[tuple[str, list[int], list[Span] | None]]:
    options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "verbose": False}
    if tokenizer.is_fast:
        encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, **options)
        yield from zip(texts, encoded["input_ids"], encoded["offset_mapping"])
    else:
        for text, ids in zip(texts, tokenizer(texts, **options)["input_ids"]):
            yield text, ids, None


def _cut(
    number: int,
    record: dict[str, Any],
    rendered: _Rendered,
    tokenizer: Tokenizer,
    config: DataConfig,
    context: int | None,
) -> Iterator[Row]:
    length = len(rendered.ids)
    step = config.chunk_length
    plain = {name: _plain(value) for name, value in record.items()}
    if not step:
        if context is not None and length > context and not config.truncation:
            raise DataError(
                f"row {number} has {length} tokens, the model takes {context}: use --truncation to cut it, "
                f"or --chunk-length {context} to keep all of it in chunks"
            )
        if rendered.spans is None and not any(isinstance(value, str) for value in plain.values()):
            plain["text"] = _text_of(rendered, 0, length, tokenizer)  # so that a hit can be read
        yield _row(rendered, 0, min(length, context or length), plain)
        return
    plain.pop(config.prompt_column, None)
    for start in range(0, max(length, 1), step):
        stop = min(start + step, length)
        narrowed = {name: plain[name][start:stop] for name in _TOKEN_COLUMNS if plain.get(name) is not None}
        text = _text_of(rendered, start, stop, tokenizer)
        place = {"text": text, "document": number, "start": start, "stop": stop}
        yield _row(rendered, start, stop, {**plain, **narrowed, **place})


def _row(rendered: _Rendered, start: int, stop: int, record: dict[str, Any]) -> Row:
    labelled = rendered.labelled[start:stop].copy()
    labelled[:1] = False
    return Row(np.asarray(rendered.ids[start:stop], dtype=np.int64), labelled, record)


def _text_of(rendered: _Rendered, start: int, stop: int, tokenizer: Tokenizer | None) -> str:
    if rendered.spans is None:
        return "" if tokenizer is None else str(tokenizer.decode(rendered.ids[start:stop]))
    return rendered.text[_border(rendered, rendered.spans, start) : _border(rendered, rendered.spans, stop)]


def _border(rendered: _Rendered, spans: list[Span], place: int) -> int:
    """Where the text before token ``place`` ends: spans may leave out spaces, or share a character between tokens."""
    if place == len(spans):
        return len(rendered.text)
    return next((end for _, end in reversed(spans[:place]) if end), 0)  # special tokens stand at (0, 0)


def _integers(value: Any, number: int, column: str) -> list[int]:
    found = value.tolist() if hasattr(value, "tolist") else value  # arrays and tensors
    if not isinstance(found, list) or not all(isinstance(each, int) for each in found):
        raise DataError(f"row {number}, column {column!r}: expected a list of token ids, found {type(value).__name__}")
    return found


def _text(record: dict[str, Any], column: str, number: int) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise DataError(f"row {number}, column {column!r}: expected text, found {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if hasattr(value, "tolist"):  # arrays, their scalars, tensors
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    return str(value)
