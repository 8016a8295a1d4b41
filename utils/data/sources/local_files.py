"""Local data files: finding them below a path, and reading them row by row with the location of each row.

Every reader yields `(where, row)`: `where` names the file and the line or row for messages ("a.jsonl, line 7").
Any problem with a file is an InputError of one line.
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from utils.data.formats.example import Row
from utils.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".json.gz", ".csv.gz")
HELD_OUT_WORDS = {"eval", "evaluation", "test", "validation", "valid", "val", "dev", "heldout"}
# Written beside the data by `datasets`: descriptions, not rows.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_ABOUT = ("README", "LICENSE")  # about the data
LocatedRow = tuple[str, Row]
# How far a file has been read: lines (or rows), and bytes where it can be entered at a byte.
Place = tuple[int, int]
BEGINNING: Place = (0, 0)
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_LONGEST_LINE = 2**26  # bytes, of the first one of a file of JSON lines


def find_files(path: Path, label: str, left_out: Sequence[str] = ()) -> tuple[list[Path], list[Path], list[Path]]:
    """The training files, the held-out files, and the others that `path` (a file, or a folder and all below it) holds.

    In a folder a file is held out if a word of its path below the folder is one of HELD_OUT_WORDS (test.jsonl,
    data/validation-00000-of-00001.parquet). Hidden files are left out, and so are folders and splits that are called as
    one of `left_out` is. Raises InputError, beginning with `label`, if nothing is there to train on.
    """
    if path.is_file():
        return [path], [], []
    if not path.is_dir():
        raise InputError(f"{label}: neither a file nor a folder")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.name not in _DESCRIPTIONS
        and not any(_is_left_out(part, left_out) for part in file.relative_to(path).parts)
    )
    found = [file for file in files if file.name.endswith(SUFFIXES)]
    if not found:
        raise InputError(f"{label}: the folder holds no data file ({', '.join(SUFFIXES[:4])}); add one")
    held_out = [
        file for file in found if HELD_OUT_WORDS & set(re.split(r"[^a-z]+", str(file.relative_to(path)).lower()))
    ]
    training = [file for file in found if file not in held_out]
    if not training:
        names = ", ".join(str(file.relative_to(path)) for file in held_out[:3])
        raise InputError(f"{label}: the folder holds only held-out files ({names}); add a train file")
    others = [file for file in files if file not in found and not file.name.startswith(_ABOUT)]
    return training, held_out, others


def _is_left_out(part: str, left_out: Sequence[str]) -> bool:
    """Whether part of a path is hidden, or a folder or split of these names (train_gen-00000-of-00003.parquet)."""
    return part.startswith(".") or any(part == name or part.startswith((f"{name}-", f"{name}.")) for name in left_out)


def content_digest(file: Path) -> str:
    """SHA-256 of the file's bytes. Raises InputError if it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def sampled_digest(file: Path) -> str:
    """A digest of the file's size and of parts of it, for files too large to be read at every start.

    Two files of one size that differ only between the 64 parts have the same one. Raises InputError if the file cannot
    be read.
    """
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(file, "rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def stream_rows(file: Path, start: Place = BEGINNING) -> Iterator[tuple[str, Row, Place]]:
    """The rows of one data file from `start` on, in constant memory, each with the place behind it.

    JSON lines are entered at their byte; of compressed files, CSV and the others, what comes before is passed over,
    of Parquet and Arrow files in whole groups of rows.

    Raises InputError for a JSON array, which can only be read whole.
    """
    reader = _reader(file)
    try:
        if reader in (_read_json, _read_json_lines):
            _refuse_array(file)
            yield from _json_lines(file, start)
            return
        number, _ = start
        for where, row in reader(file, number):
            number += 1
            yield where, row, (number, 0)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read: {str(error) or type(error).__name__}") from error


def _refuse_array(file: Path) -> None:
    """Raise InputError if the file's first line is not a row; of a file called .jsonl, if it is a list."""
    first = b""
    with _open(file) as stream:
        while not first and (data := stream.readline(_LONGEST_LINE)):  # an array may be a line of any length
            first = data.removeprefix(b"\xef\xbb\xbf").strip()
    is_row = not first or not first.startswith(b"[")
    if is_row and first and not file.name.removesuffix(".gz").endswith(".jsonl"):
        try:
            is_row = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            is_row = False
    if not is_row:
        raise InputError(
            f"{file}: not one JSON object per line, and --streaming cannot read a JSON array, which has to be read "
            "whole: write it as JSON lines (jq -c '.[]')"
        )


def read_rows(file: Path) -> Iterator[LocatedRow]:
    """The rows of one data file, its kind determined by its name or, for other names, by its first bytes."""
    try:
        if file.stat().st_size == 0:
            raise InputError(f"{file} is empty")
        rows = _reader(file)(file)
        first = next(rows, None)
        if first is None:
            raise InputError(f"{file} holds no rows")
        yield first
        yield from rows
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read: {str(error) or type(error).__name__}") from error


def _reader(file: Path):
    name = file.name.removesuffix(".gz")
    for suffix, reader in ((".csv", _read_csv), (".parquet", _read_parquet), (".arrow", _read_arrow)):
        if name.endswith(suffix):
            return reader
    with _open(file) as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        return _read_parquet
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first not in (b"[", b"{") and not name.endswith((".json", ".jsonl")):
        raise InputError(
            f"{file}: not a kind of file that can be read ({', '.join(SUFFIXES[:5])}, the text kinds also as .gz), and "
            "not JSON by its first character; convert it, or rename it"
        )
    whole = first == b"[" or (first == b"{" and name.endswith(".json"))
    return _read_json if whole else _read_json_lines


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from error


def _read_json_lines(file: Path) -> Iterator[LocatedRow]:
    for where, row, _ in _json_lines(file, BEGINNING):
        yield where, row


def _json_lines(file: Path, start: Place) -> Iterator[tuple[str, Row, Place]]:
    number, offset = start
    with _open(file) as stream:
        if file.name.endswith(".gz"):
            next(itertools.islice(stream, number, number), None)
        else:
            stream.seek(offset)
        for data in stream:
            number, offset = number + 1, offset + len(data)
            where = f"{file}, line {number}"
            line = _decode(data, where).strip()
            if not line:
                continue
            yield where, _object(_json(line, where), where), (number, offset)


def _read_json(file: Path) -> Iterator[LocatedRow]:
    """A JSON array of rows, an object with one such array (or one row), or JSON lines in a file called .json."""
    with _open(file) as stream:
        text = _decode(stream.read(), str(file))
    try:
        document = _json(text, str(file), has_lines=True)
    except InputError:
        if text.lstrip()[:1] != "{":
            raise
        yield from _read_json_lines(file)
        return
    if isinstance(document, dict):
        arrays = [value for value in document.values() if isinstance(value, list)]
        document = arrays[0] if len(document) == 1 and arrays else [document]
    for number, row in enumerate(document, 1):
        where = f"{file}, row {number}"
        yield where, _object(row, where)


def _json(text: str, where: str, *, has_lines: bool = False) -> object:
    """What `text` holds. Raises InputError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if has_lines else ""
        raise InputError(f"{where}{line}: not valid JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # an integer with thousands of digits
        raise InputError(f"{where}: a number that cannot be read ({error})") from error
    except RecursionError as error:
        raise InputError(f"{where}: lists or objects are nested too deep to be read") from error


def _object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object with named columns, found {type(row).__name__}")
    return row


def _read_csv(file: Path, skipped: int = 0) -> Iterator[LocatedRow]:
    csv.field_size_limit(sys.maxsize)
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        try:
            yield from itertools.islice(_csv_rows(file, csv.reader(text, strict=True)), skipped, None)
        except UnicodeDecodeError:
            _find_wrong_line(file)
            raise


def _find_wrong_line(file: Path) -> None:
    """Raise InputError with the line that is not UTF-8: a decoder of a whole file reads ahead."""
    with _open(file) as stream:
        for number, data in enumerate(stream, 1):
            _decode(data, f"{file}, line {number}")


def _csv_rows(file: Path, reader) -> Iterator[LocatedRow]:
    try:
        header = next(reader, [])
        if twice := next((name for name in header if header.count(name) > 1), None):
            raise InputError(f"{file}, line 1: the column {twice!r} appears twice; rename one of them")
        line = reader.line_num + 1  # a row may span lines: its location is where it begins
        for fields in reader:
            where = f"{file}, line {line}"
            line = reader.line_num + 1
            if not fields:
                continue
            if len(fields) != len(header):
                raise InputError(f"{where}: {len(fields)} fields, but the header has {len(header)} columns")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: not valid CSV ({error})") from error


def _read_parquet(file: Path, skipped: int = 0) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            group, before = 0, 0
            while group < table.num_row_groups and before + table.metadata.row_group(group).num_rows <= skipped:
                before += table.metadata.row_group(group).num_rows
                group += 1
            if group == table.num_row_groups:
                return
            groups = range(group, table.num_row_groups)
            yield from _number(file, table.iter_batches(1000, row_groups=groups), before, skipped)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file} is not a valid parquet file: {str(error).splitlines()[0]}") from error


def _read_arrow(file: Path, skipped: int = 0) -> Iterator[LocatedRow]:
    """The stream format of `datasets.save_to_disk`."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as stream, pyarrow.ipc.open_stream(stream) as batches:
            yield from _number(file, batches, 0, skipped)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{file} is not a valid Arrow stream: {str(error).splitlines()[0]}") from error


def _number(file: Path, batches, before: int, skipped: int) -> Iterator[LocatedRow]:
    """The rows of `batches`, of which the first is row `before` + 1 of the file, without the file's first `skipped`."""
    number = before
    for batch in batches:
        known = min(max(skipped - number, 0), batch.num_rows)
        number += known
        for row in batch.slice(known).to_pylist():
            number += 1
            yield f"{file}, row {number}", row
