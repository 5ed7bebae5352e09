"""Rows from files: encodings, line breaks, missing values, and messages that name the row."""

import json

import pytest

from probing import DataError
from probing._table import Table, read_table


def written(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def test_quoted_line_breaks_are_part_of_a_cell(tmp_path):
    path = written(tmp_path, "rows.csv", 'text,y\r\n"the cat\nand, the dog",1\r\n"a ""b""",2\r\n')
    table = read_table(path)
    assert table.column("text") == ["the cat\nand, the dog", 'a "b"']
    assert table.places[1] == f"{path}, row 2 (line 4)"


def test_tabs_separate_a_tsv(tmp_path):
    assert read_table(written(tmp_path, "rows.tsv", "text\ty\nthe cat, here\t1\n")).rows == [
        {"text": "the cat, here", "y": "1"}
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b"])
def test_other_line_separators_break_no_row(tmp_path, separator):
    rows = [{"text": f"one{separator}two", "y": 1}, {"text": "three", "y": 0}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if separator != "\x0b":  # JSON has control characters escaped
        assert read_table(written(tmp_path, "rows.jsonl", text)).rows == rows
    table = read_table(written(tmp_path, "rows.csv", f"text,y\none{separator}two,1\nthree,0\n"))
    assert table.column("text") == [f"one{separator}two", "three"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, name):
    text = "text,y\nthe cat,1\n" if name.endswith("csv") else '{"text": "the cat", "y": "1"}\n'
    assert read_table(written(tmp_path, name, text, "utf-8-sig")).rows == [{"text": "the cat", "y": "1"}]


def test_another_encoding_is_named_with_what_to_type(tmp_path):
    with pytest.raises(DataError, match=r"rows\.csv, line 3: byte 0xe9 is not UTF-8.*iconv -f latin1 -t utf-8 rows"):
        read_table(written(tmp_path, "rows.csv", "text,y\nthe cat,1\ncafé,2\n", "latin-1"))
    with pytest.raises(DataError, match="iconv -f utf-16"):
        read_table(written(tmp_path, "rows.csv", "text,y\nthe cat,1\n", "utf-16"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", '[{"a": 1}, 3]', r"rows\.json, row 2: a row is an object .*found 3"),
        ("rows.json", '{"a": 1}', "expected a list of objects"),
        ("rows.json", '{"a": 1}\n{"a": 2}', r"one object a line is a \.jsonl file"),
        ("rows.jsonl", '{"a": 1}\n\n[2]', r"rows\.jsonl, row 2 \(line 3\): a row is an object"),
        ("rows.jsonl", '{"a": 1}\n{"a":', r"rows\.jsonl, line 2: not valid JSON"),
        ("rows.csv", 'a,b\n1,2\n3,"4\n', r"rows\.csv, line 3: .*is a quotation mark open"),
        ("rows.csv", "a,b\n1,2,3\n", r"rows\.csv, line 2: 3 cells under 2 column names.*double quotes"),
        ("rows.csv", "a,a\n1,2\n", "the header names 'a' twice"),
        ("rows.csv", "a,b\n", "found none"),
        ("rows.jsonl", "", "found none"),
        ("rows.txt", "a", r"not \.txt"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_table(written(tmp_path, name, text))


def test_a_missing_value_is_named_by_its_row_in_the_file(tmp_path):
    csv = read_table(written(tmp_path, "rows.csv", "text,y\na,1\nb,\n"))
    with pytest.raises(DataError, match=r"rows\.csv, row 2 \(line 3\): no value in column 'y'.*--missing skip"):
        csv.column("y")
    short = read_table(written(tmp_path, "short.csv", "text,y\na,1\nb\n"))
    with pytest.raises(DataError, match="row 2"):
        short.column("y")
    for row in ('{"text": "b", "y": null}', '{"text": "b"}', '{"text": "b", "y": NaN}'):
        table = read_table(written(tmp_path, "rows.jsonl", '{"text": "a", "y": 1}\n' + row))
        with pytest.raises(DataError, match=r"rows\.jsonl, row 2: no value in column 'y'"):
            table.column("y")
        assert table.complete(["text", "y"]).places == table.places[:1]


def test_a_column_that_no_row_has_is_named_with_its_neighbours():
    table = Table.of([{"text": "a", "number": 1}, {"text": "b", "word": "b"}])
    with pytest.raises(DataError, match=r"the data: no column 'numbers'; did you mean 'number'\?"):
        table.column("numbers")
    with pytest.raises(DataError, match="it has text, number, word"):
        table.complete(["zzz"])
    with pytest.raises(DataError, match="no row has a value in each of the columns number, word"):
        table.complete(["number", "word"])
