import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from utils.data.sources.local_files import find_files, read_rows
from utils.errors import InputError

ROWS = [{"text": "eins"}, {"text": 'zwei, "drei"\nvier'}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\n" + LINES.replace("\n", "\r\n\r\n")),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.txt.train", LINES),
        ("a.csv", 'text\neins\n"zwei, ""drei""\nvier"\n'),
    ],
)
def test_text_files(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    assert read(file) == ROWS


def test_a_json_file_may_hold_one_row(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "eins",\n "n": [1]}')
    assert read(tmp_path / "a.json") == [{"text": "eins", "n": [1]}]


def test_compressed_and_binary_files(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(LINES)
    table = pa.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    for name in ("a.jsonl.gz", "a.parquet", "a.arrow"):
        assert read(tmp_path / name) == ROWS


def test_every_row_has_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    (tmp_path / "a.csv").write_text('text,n\n"a\nb",1\nc,2\n')
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    places = [
        where.split(", ")[1] for name in ("a.jsonl", "a.csv", "a.json") for where, _ in read_rows(tmp_path / name)
    ]
    assert places == ["line 1", "line 3", "line 2", "line 4", "row 1", "row 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no rows"),
        ("a.json", b"[]", "a.json holds no rows"),
        ("a.csv", b"text\n", "a.csv holds no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a.jsonl, line 2: not valid JSON \(Expecting value at column 6\)"),
        ("a.json", b'{"a": 1}\n{"a": \n', "a.json, line 2: not valid JSON"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', "a.json, line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2: a row must be a JSON object with named columns, found list"),
        ("a.json", b"[1]", "a.json, row 1: a row must be a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl, line 1: not UTF-8 text"),
        ("a.csv", b"a,b\n1,2\n1\n", "a.csv, line 3: 1 fields, but the header has 2 columns"),
        ("a.csv", b'a\n"open\n', "a.csv, line 2: not valid CSV"),
        ("a.parquet", b"PAR1 not at all", "a.parquet is not a valid parquet file"),
        ("a.arrow", b"not at all, really", "a.arrow is not a valid Arrow stream"),
        ("a.jsonl.gz", b"not at all", "a.jsonl.gz cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_is_divided_by_names(tmp_path):
    for name in (
        "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet",
        "helpful/train.jsonl.gz", "validation/rows.csv", ".cache/train.jsonl", "dataset_info.json", "README.md",
        "latest/contest.jsonl", "more/rows.tsv", "LICENSE.txt", "notes.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    training, held_out, others = find_files(tmp_path, "--data_path x")
    assert [str(file.relative_to(tmp_path)) for file in training] == [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "helpful/train.jsonl.gz",
        "latest/contest.jsonl",
    ]
    assert [file.name for file in held_out] == ["test-00000-of-00001.parquet", "rows.csv"]
    assert [file.name for file in others] == ["rows.tsv", "notes.txt"]


def test_a_folder_without_training_data(tmp_path):
    with pytest.raises(InputError, match="--data_path x: the folder holds no data file"):
        find_files(tmp_path, "--data_path x")
    (tmp_path / "eval.jsonl").touch()
    with pytest.raises(InputError, match=r"only held-out files \(eval.jsonl\)"):
        find_files(tmp_path, "--data_path x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"n": ' + "9" * 5001 + "}", "a.jsonl, line 2: a number that cannot be read"),
        ("a.json", '[{"n": ' + "9" * 5001 + "}]", "a.json: a number that cannot be read"),
        ("a.jsonl", '{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "a.jsonl, line 1: .* too deep to be read"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "a.json: .* too deep to be read"),
        ("a.csv", "prompt,chosen,prompt\na,b,c\n", "a.csv, line 1: the column 'prompt' appears twice; rename one"),
        ("a.tsv", "prompt\tchosen\na\tb\n", "a.tsv: not a kind of file that can be read .* convert it, or rename it"),
        ("notes.txt", "Some text.\n", "notes.txt: not a kind of file that can be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_without_a_traceback(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_json_in_a_file_of_another_name_is_read(tmp_path):
    (tmp_path / "rows.txt").write_text('{"prompt": "x"}\n')
    assert [row for _, row in read_rows(tmp_path / "rows.txt")] == [{"prompt": "x"}]


def test_what_is_neither_file_nor_folder():
    with pytest.raises(InputError, match="^--data_path /dev/null: neither a file nor a folder"):
        find_files(Path("/dev/null"), "--data_path /dev/null")
