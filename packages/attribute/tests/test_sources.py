"""Every kind of local dataset reads as the same records, and what cannot be read is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from attribute import DataConfig, DataError
from attribute.data import Source, open_source
from attribute.data.sources import of_dataset, parse_arguments

RECORDS = [{"text": f'row {number}, "quoted"\nsecond line', "topic": number % 3} for number in range(25)]


def json_array(path: Path) -> Path:
    (path / "d.json").write_text(json.dumps(RECORDS, indent=1))
    return path / "d.json"


def json_lines(path: Path) -> Path:
    (path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path / "d.jsonl"


def json_lines_called_json(path: Path) -> Path:
    return json_lines(path).rename(path / "d.json")


def csv_file(path: Path) -> Path:
    lines = ['"{}",{}\n'.format(record["text"].replace('"', '""'), record["topic"]) for record in RECORDS]
    (path / "d.csv").write_text("text,topic\n" + "".join(lines))
    return path / "d.csv"


def parquet_file(path: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(RECORDS), path / "d.parquet")
    return path / "d.parquet"


def folder(path: Path) -> Path:
    (path / "d").mkdir()
    for name, part in (("b", RECORDS[10:]), ("a", RECORDS[:10])):
        (path / "d" / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return path / "d"


def on_disk(path: Path) -> Path:
    datasets.Dataset.from_list(RECORDS).save_to_disk(path / "d")
    return path / "d"


def dict_on_disk(path: Path) -> Path:
    other = datasets.Dataset.from_list([{"text": "another split", "topic": 0}])
    datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS), test=other).save_to_disk(path / "d")
    return path / "d"


KINDS = [json_array, json_lines, json_lines_called_json, csv_file, parquet_file, folder, on_disk, dict_on_disk]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    return request.param


def records_of(source: Source) -> list[dict]:
    return [record for batch in source.batches() for record in batch]


def test_every_kind_gives_the_same_records_as_often_as_asked(kind, tmp_path):
    source = open_source(DataConfig(dataset=str(kind(tmp_path))))
    assert records_of(source) == RECORDS
    assert records_of(source) == RECORDS
    assert (source.columns, source.length) == (("text", "topic"), 25)


@pytest.mark.parametrize(
    ("split", "part"),
    [
        ("train[:7]", slice(7)),
        ("train[20:]", slice(20, None)),
        ("train[20%:60%]", slice(5, 15)),
        ("train[-5:]", slice(-5, None)),
        ("train[:-20%]", slice(-5)),
        ("train[:1000]", slice(None)),
    ],
)
def test_a_split_takes_the_rows_a_python_slice_would(kind, split, part, tmp_path):
    assert records_of(open_source(DataConfig(dataset=str(kind(tmp_path)), split=split))) == RECORDS[part]


@pytest.mark.parametrize("make", KINDS[:-2], ids=lambda kind: kind.__name__)
def test_a_stream_gives_the_same_records_as_often_as_asked(make, tmp_path):
    source = open_source(DataConfig(dataset=str(make(tmp_path)), streaming=True))
    assert (source.columns, source.length) == (("text", "topic"), None)
    assert records_of(source) == records_of(source) == RECORDS


@pytest.mark.parametrize(
    ("split", "part"), [("train[:7]", slice(7)), ("train[3:9]", slice(3, 9)), ("train[20:]", slice(20, None))]
)
def test_a_stream_counts_rows_from_its_start(split, part, tmp_path):
    source = open_source(DataConfig(dataset=str(json_lines(tmp_path)), split=split, streaming=True))
    assert records_of(source) == RECORDS[part]


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (json_lines, {"split": "train[:10%]"}, "no length to take"),
        (json_lines, {"split": "train[30:]"}, "has no rows"),
        (on_disk, {}, "leave --streaming away"),
        (lambda _: "./nowhere.jsonl", {}, "no file or folder"),
        (json_lines, {"data_args": "colour=red"}, "cannot be streamed"),
    ],
)
def test_a_stream_that_cannot_be_read_says_why(make, changes, said, tmp_path):
    with pytest.raises(DataError, match=said):
        open_source(DataConfig(dataset=str(make(tmp_path)), streaming=True, **changes))


def test_a_stream_that_breaks_off_says_so(tmp_path):
    records = [{"text": "a"}, {"text": "b"}]

    def broken():
        yield from records * 600
        raise OSError("the line is dead")

    source = of_dataset("odd", datasets.IterableDataset.from_generator(broken))
    with pytest.raises(DataError, match=r"the stream of odd broke off: .*the line is dead"):
        records_of(source)


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", ["one", "two", " three", "four"]),
        ("paragraph", ["one\ntwo", " three\nfour\n"]),
        ("document", ["one\ntwo\n\n three\nfour\n"]),
    ],
)
def test_text_is_sampled_by_line_paragraph_or_document(sample_by, expected, tmp_path):
    (tmp_path / "d.txt").write_text("one\ntwo\n\n three\nfour\n")
    source = open_source(DataConfig(dataset=str(tmp_path / "d.txt"), data_args=f"sample_by={sample_by}"))
    assert [record["text"] for record in records_of(source)] == expected


def test_a_large_csv_with_line_breaks_in_its_texts_reads_whole(tmp_path):
    text = "a line\n" * 40
    (tmp_path / "d.csv").write_text("text\n" + f'"{text}"\n' * 6000)  # several of pyarrow's blocks
    source = open_source(DataConfig(dataset=str(tmp_path / "d.csv")))
    assert {record["text"] for record in records_of(source)} == {text}
    assert source.length == 6000


def test_a_json_array_keeps_columns_that_its_first_record_lacks(tmp_path):
    (tmp_path / "d.json").write_text('[{"text": "a"}, {"text": "b", "note": "x"}]')
    source = open_source(DataConfig(dataset=str(tmp_path / "d.json")))
    assert records_of(source) == [{"text": "a", "note": None}, {"text": "b", "note": "x"}]


def test_files_named_after_splits_are_those_splits(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    texts = {
        split: [record["text"] for record in records_of(open_source(DataConfig(dataset=str(tmp_path), split=split)))]
        for split in ("train", "test")
    }
    assert texts == {"train": ["train-00000-of-00002", "train-00001-of-00002"], "test": ["test-00000-of-00001"]}


def test_arguments_are_read_as_json_where_they_are():
    assert parse_arguments('a=1,b=x,c=true,d="2"') == {"a": 1, "b": "x", "c": True, "d": "2"}


def _write(name: str, content: str) -> Callable[[Path], DataConfig]:
    def write(path: Path) -> DataConfig:
        (path / name).write_text(content)
        return DataConfig(dataset=str(path / name))

    return write


def _with(kind: Callable[[Path], Path], **options: str) -> Callable[[Path], DataConfig]:
    return lambda path: DataConfig(dataset=str(kind(path)), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: DataConfig(dataset=str(path / "nothing.jsonl")), "there is no file or folder"),
        (lambda path: DataConfig(dataset=str(path)), r"holds none of \*.parquet"),
        (_write("d.jsonl", ""), "has no rows"),
        (_write("d.json", "[]"), "has no rows"),
        (_write("d.csv", ""), "has no rows"),
        (_write("d.csv", "text\n"), "has no rows"),
        (_write("d.txt", "\n \n"), "has no rows"),
        (_write("d.jsonl", '{"text": "a"}\n{"text": '), "cannot be read"),
        (_write("d.json", '[{"text": "a"}, '), "cannot be read"),
        (_write("d.json", '["a", "b"]'), "is a list of str, not of records"),
        (_write("d.json", '[{"text": "a"}, {"text": 3}]'), "cannot be read"),
        (_write("d.parquet", "not parquet"), "cannot be read"),
        (_with(json_lines, split="train[1:2:3]"), "not of the form"),
        (_with(json_lines, split="train[30:]"), r"has no rows \(split 'train\[30:\]'\)"),
        (_with(json_lines, split="test"), "has no split 'test'; it has train"),
        (_with(dict_on_disk, split="valid"), "has no split 'valid'; it has train, test"),
        (_with(json_lines, subset="en"), "--subset en is for datasets of the hub"),
        (_with(on_disk, data_args="a=1"), "for datasets of the hub"),
        (_with(csv_file, data_args="delimiter=;"), "takes no 'delimiter'"),
        (_with(json_lines, data_args="nonsense"), "wants name=value"),
        (
            lambda path: DataConfig(dataset="no-such-dataset"),
            "neither a local file or folder nor one that",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(make, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_source(make(tmp_path))


def test_unreadable_bytes_are_refused(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(DataConfig(dataset=str(tmp_path / "d.txt")))


def test_a_broken_folder_of_save_to_disk_is_refused(tmp_path):
    next(on_disk(tmp_path).glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(DataConfig(dataset=str(tmp_path / "d")))


def test_a_missing_column_is_named_with_close_matches(tmp_path):
    with pytest.raises(DataError, match="no column 'txt'; it has text, topic; did you mean text"):
        open_source(DataConfig(dataset=str(json_lines(tmp_path)))).require("txt")
