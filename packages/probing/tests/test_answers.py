"""Answers: parsed, tokenised, and measured by the definition."""

import click
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from zoo import make

from probing import DataError, ProbeData
from probing._answers import batches, check_fit, choice_measure, continuation, parse_answers

WORDS = ["[UNK]", "The", "man", "is", "are", "seven"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def test_answers_go_by_order_or_by_label():
    names = ["0", "2", "10"]
    assert parse_answers(" a, b, c", names) == {"0": " a", "2": " b", "10": " c"}
    assert list(parse_answers("10= c,0= a, 2= b", names).items()) == [("0", " a"), ("2", " b"), ("10", " c")]
    assert parse_answers("a=b=x,a=y", ["a", "a=b"]) == {"a=b": "x", "a": "y"}
    assert parse_answers("==,=!", ["no", "yes"]) == {"no": "==", "yes": "=!"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (" are,", "the answer of 'sg' is empty"),
        (",", "the answer of 'pl' is empty"),
        (" are", "1 words for 2 labels: give one a label, in the order pl, sg, or as LABEL=word"),
        (" is, are, am", "3 words for 2 labels"),
        ("sg= is, are", "' are' names no label; the labels are pl, sg"),
        ("sg= is,sg= are", "2 words for 2 labels"),
        (" is, is", "two labels have one answer"),
    ],
)
def test_answers_that_are_no_choice_are_refused(given, message):
    with pytest.raises(click.UsageError) as error:
        parse_answers(given, ["pl", "sg"])
    assert message in error.value.message


def test_an_answer_has_tokens_of_its_own_that_the_tokenizer_knows(tokenizer):
    assert continuation(tokenizer, " is are") == [3, 4]
    with pytest.raises(DataError, match="'ly' grows together with the word before it; begin it with a space"):
        continuation(tokenizer, "ly")
    with pytest.raises(DataError, match="does not know ' am'"):
        continuation(tokenizer, " am")


def test_no_batch_has_one_row_alone():
    for rows in range(2, 40):
        parts = batches(rows, 8)
        assert torch.cat(parts).tolist() == list(range(rows))
        assert min(map(len, parts)) > 1


def of(*texts):
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    attention = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return ProbeData.at_last({"input_ids": ids, "attention_mask": attention}, torch.arange(len(texts)) % 2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_choice_measure_compares_whole_answers(kind):
    model, draw = make(kind), torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 96, (length,), generator=draw).tolist() for length in (2, 7, 4, 9, 3)]
    data, answers = of(*texts), [[10], [11, 3]]
    right = []
    with torch.no_grad():
        for number, text in enumerate(texts):  # the definition: one text and one answer at a time
            scores = []
            for answer in answers:
                log_p = model(torch.tensor([text + answer])).logits[0].log_softmax(-1)
                scores.append(sum(log_p[len(text) - 1 + i, token].item() for i, token in enumerate(answer)))
            right.append(float(max(range(2), key=scores.__getitem__) == number % 2))
    before = data.inputs["input_ids"].clone()
    assert choice_measure(data, answers, batch_size=4)(model).tolist() == right
    assert torch.equal(data.inputs["input_ids"], before)


def test_an_answer_may_end_where_the_context_does_and_no_further():
    model = make("gpt2")  # 40 positions
    data = of(list(range(3, 43)), [5, 6])
    assert choice_measure(data, [[10], [11]])(model).shape == (2,)
    check_fit(data, ["a", "b"], {" x": [10]}, 40)
    with pytest.raises(DataError, match=r"rows, row 1: .*the answer ' yz' need 41 tokens, but the model takes 40"):
        check_fit(data, ["rows, row 1", "rows, row 2"], {" x": [10], " yz": [11, 3]}, 40)
    check_fit(data, ["a", "b"], {" yz": [11, 3]}, None)
    short = of(list(range(3, 42)), [5, 6])
    assert choice_measure(short, [[10, 4], [11, 3]])(model).shape == (2,)
