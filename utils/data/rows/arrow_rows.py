"""Rows on disk as Arrow streams: written batch by batch and read memory-mapped, so neither holds all in memory."""

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from utils.data.formats.example import Example, Purpose

if TYPE_CHECKING:
    import datasets

_IDS, _TEXT = pa.list_(pa.int32()), pa.large_string()
_SPAN = pa.schema([("input_ids", _IDS), ("response_start", pa.int32())])
# Numbers of a pair beside its ids: `source`, the data set that it comes from, counted in the order of the flags, and
# those read from a column that a flag names (`Corpus.number_columns`), null where none is named. A further number is
# one entry here, one in `number_columns` of the step's Config, and what null stands for in `collate_preference`.
NUMBERS = {"source": pa.int32(), "margin": pa.float64()}
SCHEMAS: dict[Purpose, pa.Schema] = {
    "sft": _SPAN,
    "pretrain": _SPAN,
    "preference": pa.schema([("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS), *NUMBERS.items()]),
    "labelled": pa.schema([("prompt_ids", _IDS), ("response_ids", _IDS), ("label", pa.bool_())]),
    "prompts": pa.schema([("prompt_ids", _IDS), ("prompt", _TEXT), ("reference", _TEXT), ("columns", _TEXT)]),
}
GROUPED_PAIRS = SCHEMAS["preference"].append(pa.field("group", pa.int64()))  # with `--pairs all`
SEVERAL_SPANS = _SPAN.append(pa.field("target_spans", pa.list_(pa.int32())))  # "sft" with `--train_on all`
# An example before tokenisation: `turns`, `parsed`, `columns`, `numbers` and `ranked` are JSON, a prompt that is text
# is in `text`, and `prompt_number` is equal for equal prompts.
EXAMPLES = pa.schema(
    [
        *(("text", _TEXT), ("turns", _TEXT), ("chosen", _TEXT), ("rejected", _TEXT), ("label", pa.bool_())),
        *(("score", pa.float64()), ("reference", _TEXT), ("columns", _TEXT), ("numbers", _TEXT)),
        *(("prompt_number", pa.int64()), ("parsed", _TEXT), ("where", _TEXT), ("published", pa.bool_())),
        *(("source", pa.int32()), ("ranked", _TEXT)),
    ]
)
KEEPS_COLUMNS: frozenset[Purpose] = frozenset({"prompts"})  # which a reward may read


def row_schema(purpose: Purpose, train_on: str = "last", pairs: str = "best_worst") -> pa.Schema:
    """The columns of the rows of `purpose`, whose dialogues train the last answer or all of them."""
    if purpose == "preference" and pairs == "all":
        return GROUPED_PAIRS
    return SEVERAL_SPANS if purpose == "sft" and train_on == "all" else SCHEMAS[purpose]


def example_row(number: int, example: Example | None, purpose: Purpose) -> dict[str, Any]:
    """A row of `EXAMPLES`; None becomes a placeholder with only the number of its prompt."""
    if example is None:
        return dict.fromkeys(EXAMPLES.names) | {"prompt_number": number}
    is_text = isinstance(example.prompt, str)
    return {
        "text": example.prompt if is_text else None,
        "turns": None if is_text else json.dumps(example.prompt),
        "chosen": example.chosen,
        "rejected": example.rejected,
        "label": example.label,
        "score": example.score,
        "reference": example.reference,
        "columns": json.dumps(dict(example.columns), default=str) if purpose in KEEPS_COLUMNS else None,
        "numbers": json.dumps(dict(example.numbers)) if example.numbers else None,
        "prompt_number": number,
        "parsed": None if example.parsed is None else json.dumps(example.parsed),
        "where": example.where,
        "published": example.published,
        "source": example.source,
        "ranked": json.dumps(example.ranked) if example.ranked else None,
    }


def read_example(row: Mapping[str, Any]) -> Example | None:
    """The example that `example_row` wrote; None for a placeholder."""
    if row["text"] is None and row["turns"] is None:
        return None
    turns, parsed = (
        None if row[name] is None else tuple((speaker, text) for speaker, text in json.loads(row[name]))
        for name in ("turns", "parsed")
    )
    names = ("chosen", "rejected", "label", "score", "reference", "where", "published")
    others = {name: row[name] for name in names}
    columns = {} if row["columns"] is None else json.loads(row["columns"])
    numbers = {} if row["numbers"] is None else json.loads(row["numbers"])
    prompt = row["text"] if turns is None else turns
    others["source"] = row.get("source") or 0
    ranked = tuple((text, score) for text, score in json.loads(row.get("ranked") or "[]"))
    return Example(prompt=prompt, columns=columns, numbers=numbers, ranked=ranked, parsed=parsed, **others)


def as_written(example: Example, purpose: Purpose) -> Example:
    """`example` as it is after `example_row` and `read_example`, of which it depends on neither file nor number."""
    return read_example(example_row(0, example, purpose)) or example


def rows_in_memory(schema: pa.Schema, rows: list[dict[str, Any]]) -> "datasets.Dataset":
    """A few `rows` as `open_rows` gives those of a file."""
    import datasets

    return datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_pylist(rows, schema)))


def write_rows(file: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]], batch: int = 1000) -> int:
    """Write `rows` to `file` and return how many there were."""
    written = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        rows = iter(rows)
        while some := list(islice(rows, batch)):
            stream.write_batch(pa.RecordBatch.from_pylist(some, schema))
            written += len(some)
    return written


def open_rows(file: Path) -> "datasets.Dataset":
    """The rows of `file`, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(file))
