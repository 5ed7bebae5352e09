"""From rows to a probing task: positions, lengths, labels and parts."""

from collections import Counter

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from probing import DataError
from probing._place import find_word
from probing._split import split
from probing._table import Table
from probing._task import Reading, load_task, load_tasks

WORDS = ["[PAD]", "[UNK]", "the", "old", "man", "dogs", "near", "red", "cat", "This", "is", "wise", "king"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=4, padding_side="left"
    )


def probed(task):
    return task.train.token_mask.int().argmax(1).tolist()


def test_positions_count_from_the_text_whatever_the_padding(tokenizer):
    rows = [
        {"text": "the old man", "y": 0, "w": "old"},
        {"text": "the dogs near the red cat", "y": 1, "w": "the red"},
        {"text": "the cat", "y": 1, "w": "the"},
    ]
    for position, expected in {
        "last": [2, 5, 1],
        "first": [0, 0, 0],
        "-2": [1, 4, 0],
        "1": [1, 1, 1],
        "word:w": [1, 4, 0],
    }.items():
        task = load_task(rows, tokenizer, label="y", reading=Reading(position=position), test_rows=rows)
        assert probed(task) == expected
    for position, message in {
        "2": r"the data, row 3 has 2 tokens, so there is no position 2",
        "middle": r"--position 'middle' is no rule",
        "word:v": "no column 'v'",
    }.items():
        with pytest.raises(DataError, match=message):
            load_task(rows, tokenizer, label="y", reading=Reading(position=position), test_rows=rows)


@pytest.mark.parametrize(
    ("text", "word", "start"),
    [
        ("This king is wise", "is", 10),
        ("The king and the queen", "he", None),
        ("cat concat cat_2 cat2", "cat", 0),
        ("concat cat_2 cat2", "cat", None),
        ("naïve na", "na", 6),
        ("café cafe", "caf", None),
        ("cafe\u0301 cafe", "cafe", 6),
        ("straße", "stra", None),
        ("the king's", "king", 4),
        ("the king's", "'s", 8),
        ("is, is", "is", 0),
        ("a (b) c", "(b)", 2),
        ("हिन्दी हिन", "हिन", 7),
        ("我是学生", "学生", 2),
    ],
)
def test_words_are_found_whole(text, word, start):
    assert find_word(text, word) == start


def test_a_word_inside_another_is_not_probed(tokenizer):
    rows = [{"text": "This king is wise", "w": "is", "y": i % 2} for i in range(4)]
    assert probed(load_task(rows, tokenizer, label="y", reading=Reading(position="word:w"), test_rows=rows)) == [2] * 4
    rows[2]["text"] = "This king"
    with pytest.raises(DataError, match=r"the data, row 3: 'is' does not occur as a whole word in 'This king'"):
        load_task(rows, tokenizer, label="y", reading=Reading(position="word:w"), test_rows=rows)


def test_rows_longer_than_the_model_takes_are_refused_or_cut(tokenizer):
    rows = [{"text": "the cat", "y": 0}, {"text": "the red cat near the king", "y": 1, "w": "king"}]
    with pytest.raises(DataError, match=r"row 2: 6 tokens, but the model takes 4; .*--cut to keep the first 4$"):
        load_task(rows, tokenizer, label="y", reading=Reading(max_length=4, context=4), test_rows=rows)
    with pytest.raises(DataError, match=r"row 2: 6 tokens, but --max-length is 4; .*--cut .*, or --max-length 6"):
        load_task(rows, tokenizer, label="y", reading=Reading(max_length=4, context=8), test_rows=rows)
    cut = load_task(rows, tokenizer, label="y", reading=Reading(max_length=4, context=4, cut=True), test_rows=rows)
    assert cut.train.inputs["input_ids"].shape == (2, 4)
    assert probed(cut) == [1, 3]
    whole = load_task(rows, tokenizer, label="y", test_rows=rows)
    assert whole.train.inputs["input_ids"].shape == (2, 6)
    reading = Reading(position="word:w", max_length=4, cut=True)
    with pytest.raises(DataError, match=r"row 1: the word 'king' lies behind the tokens kept.*--max-length"):
        load_task([rows[1], rows[1] | {"y": 0}], tokenizer, label="y", reading=reading, test_rows=rows)
    with pytest.raises(DataError, match=r"row 1: the text has no tokens"):
        load_task([{"text": " ", "y": 0}, *rows], tokenizer, label="y", test_rows=rows)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 1, 10, 11, 2], ["0", "1", "2", "10", "11"]),
        (["-1", "10", "2.5"], ["-1", "2.5", "10"]),
        ([True, False], ["false", "true"]),
        ([1.0, 2, 1], ["1", "2"]),
        (["10", "2", "x"], ["10", "2", "x"]),
        (["sg", "pl"], ["pl", "sg"]),
    ],
)
def test_classes_come_in_the_order_of_their_numbers(tokenizer, values, names):
    rows = [{"text": "the cat", "y": value} for value in values]
    task = load_task(rows, tokenizer, label="y", test_rows=rows)
    assert task.names == names
    assert task.train.labels.max() == len(names) - 1


def test_labels_that_cannot_be_scored_are_refused_with_part_and_column(tokenizer):
    def rows(*values):
        return [{"text": "the cat", "y": value} for value in values]

    with pytest.raises(DataError, match=r"label 'y': all 4 rows of the data are '1', and with one class"):
        load_task(rows(1, 1, 1, 1), tokenizer, label="y")
    with pytest.raises(DataError, match=r"'y': all 1 rows of the test part of the data are '1'.*--seed.*--test"):
        load_task(rows(1, 1, 1, 1, 0), tokenizer, label="y")
    with pytest.raises(DataError, match=r"label 'y': all 2 rows of the test rows are '1'.*of other classes"):
        load_task(rows(1, 0), tokenizer, label="y", test_rows=rows(1, 1))
    with pytest.raises(DataError, match=r"the test rows, row 2: label 'y' is '7', which occurs never"):
        load_task(rows(1, 0), tokenizer, label="y", test_rows=rows(1, 7))
    with pytest.raises(DataError, match=r"row 1: the label 'y' is a string, a number or a boolean, not \[1\]"):
        load_task(rows([1], 0), tokenizer, label="y", test_rows=rows(1, 0))
    with pytest.raises(DataError, match=r"--test-share 0\.01 of 4 rows leaves a part empty"):
        load_task(rows(1, 0, 1, 0), tokenizer, label="y", test_share=0.01)


def test_messages_after_the_split_name_rows_of_the_file(tokenizer):
    rows = [{"text": "the cat", "y": number % 2} for number in range(40)]
    rows[7]["text"] = "the"
    for seed in range(3):
        with pytest.raises(DataError, match=r"x\.jsonl, row 8 has 1 tokens, so there is no position 1"):
            load_task(Table.of(rows, "x.jsonl"), tokenizer, label="y", reading=Reading(position="1"), seed=seed)


def test_rows_without_a_value_may_be_left_out(tokenizer):
    rows = [{"text": "the cat", "y": i % 2, "z": i % 3} for i in range(24)]
    rows[3] |= {"y": None}
    rows[4] |= {"z": ""}
    rows[5] |= {"text": None}
    with pytest.raises(DataError, match=r"row 4: no value in column 'y'"):
        load_tasks(rows, tokenizer, labels=["y", "z"])
    for labels, left in ((["y"], 2), (["y", "z"], 3)):
        tasks = load_tasks(rows, tokenizer, labels=labels, skip_missing=True)
        assert {task.left_out for task in tasks} == {left}
        assert len(tasks[0].train) + len(tasks[0].test) == 24 - left
        assert all(torch.equal(task.train.inputs["input_ids"], tasks[0].train.inputs["input_ids"]) for task in tasks)


@pytest.mark.parametrize("seed", range(20))
def test_a_class_of_two_rows_is_in_both_parts(seed):
    rare = ["a"] * 30 + ["b"] * 2 + ["c"] * 3 + ["d"]
    other = [str(i % 5) for i in range(36)]
    for labels in ([rare], [rare, other]):
        train, test = split(labels, 0.25, seed)
        assert sorted(train + test) == list(range(36))
        assert len(test) == 9
        for values in labels:
            inside, outside = (Counter(values[i] for i in part) for part in (train, test))
            for name, count in Counter(values).items():
                assert inside[name] >= 1
                assert outside[name] >= 1 or count == 1


def test_parts_that_hold_every_class_are_as_drawn():
    labels = [[str(i % 2) for i in range(200)], [str(i % 3) for i in range(200)]]
    assert split(labels, 0.25, 0) == split(labels[:1], 0.25, 0) == split(labels[1:], 0.25, 0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert split(labels, 0.25, 0) == (order[50:], order[:50])
