"""Which tokens carry loss, where documents are cut, and that what a hit shows is what the model read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribute import AttributionError, DataConfig, DataError
from attribute.data import Row, Source, rows_of
from attribute.index import source_of


def rows(records: list[dict[str, Any]], tokenizer: Any, *, context: int | None = 48, **options: Any) -> list[Row]:
    return list(rows_of(source_of(records), tokenizer, DataConfig(**options), context))


def labelled_pieces(row: Row, tokenizer: Any) -> list[str]:
    return [tokenizer.decode([token]) for token, counts in zip(row.ids, row.labelled) if counts]


def test_every_token_of_a_text_but_the_first_carries_loss(tokenizer):
    (row,) = rows([{"text": "the hill and the sea", "note": 3}], tokenizer)
    assert row.ids.tolist() == tokenizer("the hill and the sea")["input_ids"]
    assert row.labelled.tolist() == [False] + [True] * (len(row.ids) - 1)
    assert row.record == {"text": "the hill and the sea", "note": 3}


def test_only_the_completion_carries_loss(tokenizer):
    (row,) = rows([{"q": "in the ", "a": "sea"}], tokenizer, prompt_column="q", completion_column="a")
    assert tokenizer.decode(row.ids) == "in the sea"
    assert labelled_pieces(row, tokenizer) == ["s", "e", "a"]


def test_a_token_that_straddles_the_border_belongs_to_the_completion(tokenizer):
    (row,) = rows([{"q": "in t", "a": "he rain"}], tokenizer, prompt_column="q", completion_column="a")
    assert tokenizer("the")["input_ids"] == [tokenizer.convert_tokens_to_ids("the")]  # the merge crosses the border
    assert labelled_pieces(row, tokenizer)[0] in ("the", " the")
    assert "".join(labelled_pieces(row, tokenizer)).strip() == "the rain"


def test_a_special_token_before_the_prompt_carries_no_loss(bos_tokenizer):
    (row,) = rows([{"q": "in ", "a": "sea"}], bos_tokenizer, prompt_column="q", completion_column="a")
    assert row.ids[0] == bos_tokenizer.bos_token_id
    assert labelled_pieces(row, bos_tokenizer) == ["s", "e", "a"]


def test_without_a_prompt_the_whole_completion_but_its_first_token_carries_loss(tokenizer):
    (row,) = rows([{"q": "", "a": "sea"}], tokenizer, prompt_column="q", completion_column="a")
    assert labelled_pieces(row, tokenizer) == ["e", "a"]


TURNS = [
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "in the sea"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "rain"},
]


@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
def test_only_assistant_turns_carry_loss_and_there_is_one_bos(which, request):
    tokenizer = request.getfixturevalue(which)
    (row,) = rows([{"chat": TURNS}], tokenizer, conversation_column="chat", context=None)
    assert tokenizer.decode(row.ids) == "<s>[user]where?[assistant]in the sea</s>[user]why?[assistant]rain</s>"
    assert row.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert "".join(labelled_pieces(row, tokenizer)) == "in the sea</s>rain</s>"
    assert row.record == {"chat": TURNS}


def test_a_conversation_without_an_answer_has_no_loss(tokenizer):
    (row,) = rows([{"chat": TURNS[:1]}], tokenizer, conversation_column="chat")
    assert not row.labelled.any()


@pytest.mark.parametrize("wrap", [list, np.array, lambda ids: __import__("torch").tensor(ids)])
def test_tokens_are_taken_as_they_are(wrap, tokenizer):
    ids, labels = [5, 6, 7, 8], [-100, -100, 7, 8]
    with_labels, without = rows([{"input_ids": wrap(ids), "labels": wrap(labels)}, {"input_ids": wrap(ids)}], None)
    assert with_labels.ids.tolist() == without.ids.tolist() == ids
    assert with_labels.labelled.tolist() == [False, False, True, True]
    assert without.labelled.tolist() == [False, True, True, True]
    assert with_labels.record["input_ids"] == ids


def test_rows_of_tokens_show_the_text_they_stand_for(tokenizer):
    ids = tokenizer("the sea")["input_ids"]
    assert rows([{"input_ids": ids}], tokenizer)[0].record == {"input_ids": ids, "text": "the sea"}
    assert rows([{"input_ids": ids, "text": "own"}], tokenizer)[0].record["text"] == "own"


def test_truncation_cuts_at_the_context(tokenizer):
    text = "the hill and a sea " * 9
    (row,) = rows([{"text": text}], tokenizer, truncation=True, context=20)
    assert row.ids.tolist() == tokenizer(text)["input_ids"][:20]
    assert row.record["text"] == text


def test_a_long_document_is_refused_without_truncation_or_chunks(tokenizer):
    with pytest.raises(
        DataError, match=r"row 1 has 21 tokens, the model takes 20: .*--truncation .* --chunk-length 20"
    ):
        rows([{"text": "s"}, {"text": "s" * 21}], tokenizer, context=20)
    assert len(rows([{"text": "s" * 21}], tokenizer, context=None)) == 1


# Letters that merge, spaces that spans leave out, and characters of several tokens.
@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="the an dsé→𝄞\n", max_size=60), st.integers(2, 9), st.booleans())
def test_chunks_concatenate_to_the_document(text, length, bos):
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = _TOKENIZERS[bos]
    chunks = rows([{"text": text, "note": "n"}], tokenizer, chunk_length=length)
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == tokenizer(text)["input_ids"]
    assert "".join(chunk.record["text"] for chunk in chunks) == text
    assert all(len(chunk.ids) == length for chunk in chunks[:-1])
    assert all(not chunk.labelled[:1].any() and chunk.labelled[1:].all() for chunk in chunks)
    for chunk in chunks:
        assert chunk.record["document"] == 0
        assert chunk.record["stop"] - chunk.record["start"] == len(chunk.ids)
        assert chunk.record["note"] == "n"
        decoded = tokenizer.decode(chunk.ids, skip_special_tokens=True)
        if "\ufffd" not in decoded:  # no character is torn between chunks
            assert decoded == chunk.record["text"]


_TOKENIZERS: dict[bool, Any] = {}


@pytest.fixture(autouse=True)
def _both_tokenizers(tokenizer, bos_tokenizer):
    _TOKENIZERS.update({False: tokenizer, True: bos_tokenizer})


def test_chunks_of_tokens_hold_their_own_tokens(tokenizer):
    ids = tokenizer("the hill and a sea")["input_ids"]
    for given_tokenizer in (tokenizer, None):
        chunks = rows([{"input_ids": ids, "labels": ids}], given_tokenizer, chunk_length=4)
        assert [chunk.record["input_ids"] for chunk in chunks] == [ids[at : at + 4] for at in range(0, len(ids), 4)]
        assert [chunk.record["labels"] for chunk in chunks] == [ids[at : at + 4] for at in range(0, len(ids), 4)]
        assert "".join(chunk.record["text"] for chunk in chunks) == ("the hill and a sea" if given_tokenizer else "")


def test_a_chunk_is_never_longer_than_the_context(tokenizer):
    with pytest.raises(DataError, match="--chunk-length 21 exceeds the model's context of 20"):
        rows([{"text": "sea"}], tokenizer, chunk_length=21, context=20)


@pytest.mark.parametrize(("budget", "expected"), [(0, 5), (1, 1), (3, 1), (4, 2), (6, 2), (7, 3), (1000, 5)])
def test_max_tokens_stops_after_the_row_that_reaches_it(budget, expected, tokenizer):
    assert len(rows([{"text": "sss"}] * 5, tokenizer, max_tokens=budget)) == expected


def test_empty_and_one_token_documents_stay_rows_without_loss(tokenizer, bos_tokenizer):
    for each, lengths in ((tokenizer, [0, 1, 2]), (bos_tokenizer, [1, 2, 3])):
        found = rows([{"text": ""}, {"text": "s"}, {"text": "se"}], each)
        assert [len(row.ids) for row in found] == lengths
        assert [int(row.labelled.sum()) for row in found] == [max(length - 1, 0) for length in lengths]
        assert [len(row.ids) for row in rows([{"text": ""}], each, chunk_length=4)] == lengths[:1]


def test_numbers_that_json_lacks_become_null(tokenizer):
    record = {"text": "sea", "nan": float("nan"), "array": np.arange(3), "scalar": np.float32(0.5), "date": object}
    kept = rows([record], tokenizer)[0].record
    assert kept == {"text": "sea", "nan": None, "array": [0, 1, 2], "scalar": 0.5, "date": str(object)}


def strict_template(tokenizer: Any) -> Any:
    from copy import deepcopy

    strict = deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    return strict


def rewriting_template(tokenizer: Any) -> Any:
    from copy import deepcopy

    rewriting = deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }}{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    return rewriting


def no_template(tokenizer: Any) -> Any:
    from copy import deepcopy

    plain = deepcopy(tokenizer)
    plain.chat_template = None
    return plain


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"text": 3}, {}, "row 1, column 'text': expected text, found int"),
        ({"text": None}, {}, "row 1, column 'text': expected text, found NoneType"),
        ({"note": "x"}, {}, "row 1, column 'text': expected text, found NoneType"),
        ({"text": "a", "answer": None}, {"completion_column": "answer"}, "row 1, column 'answer': expected text"),
        (
            {"text": "a", "chat": "hello"},
            {"conversation_column": "chat"},
            "column 'chat' is not a list of turns",
        ),
        ({"text": "a", "chat": [{"role": "user"}]}, {"conversation_column": "chat"}, "not a list of turns"),
        ({"text": "a", "chat": None}, {"conversation_column": "chat"}, "not a list of turns"),
    ],
)
def test_values_of_the_wrong_kind_are_named(record, options, message, tokenizer):
    good = {"text": "fine", "answer": "fine", "chat": TURNS}
    with pytest.raises(DataError, match=message):
        rows([good, record], tokenizer, context=None, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (strict_template, "row 0, column 'chat': roles must alternate"),
        (rewriting_template, "the chat template rewrites earlier turns"),
        (no_template, "row 0, column 'chat': .*chat_template"),
    ],
)
def test_chat_templates_that_do_not_fit_are_refused(change, message, tokenizer):
    with pytest.raises(DataError, match=message):
        rows([{"chat": TURNS}], change(tokenizer), conversation_column="chat")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "row 1: labels must be input_ids with -100"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "row 1: labels must be input_ids with -100"),
        ({"input_ids": None}, "row 1, column 'input_ids': expected a list of token ids, found NoneType"),
        ({"input_ids": [[1, 2]]}, "row 1, column 'input_ids': expected a list of token ids"),
        ({"input_ids": "12"}, "row 1, column 'input_ids': expected a list of token ids, found str"),
    ],
)
def test_tokens_and_labels_that_disagree_are_refused(record, message):
    with pytest.raises(DataError, match=message):
        rows([{"input_ids": [1, 2]}, record], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": True, "chunk_length": 8}, "--truncation throws away what --chunk-length would keep"),
        ({"chunk_length": 1}, "--chunk-length must be 0 or at least 2"),
        ({"chunk_length": -4}, "--chunk-length must be 0 or at least 2"),
        ({"max_tokens": -1}, "--max-tokens must be 0"),
        ({"conversation_column": "a", "completion_column": "b"}, "exclude each other"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(AttributionError, match=message):
        DataConfig(**options)


def test_missing_columns_are_refused_whatever_the_form(tokenizer):
    source = Source("data", ("txt",), 1, lambda: iter([[{"txt": "a"}]]))
    for options in ({}, {"completion_column": "txt"}, {"conversation_column": "turns"}):
        with pytest.raises(DataError, match="has no column"):
            list(rows_of(source, tokenizer, DataConfig(**options), None))


def test_data_that_is_no_dataset_is_refused():
    with pytest.raises(DataError, match="has no rows"):
        source_of([])
    with pytest.raises(DataError, match=r"neither a datasets.Dataset nor a list of dictionaries"):
        source_of(["text"])
