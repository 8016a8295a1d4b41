"""Rows on disk as Arrow streams: written batch by batch, read memory-mapped, so neither needs the whole in memory."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from utils.data.example import Purpose

if TYPE_CHECKING:
    import datasets

_IDS = pa.list_(pa.int32())
_SPAN = pa.schema([("input_ids", _IDS), ("response_start", pa.int32())])
SCHEMAS: dict[Purpose, pa.Schema] = {
    "sft": _SPAN,
    "pretrain": _SPAN,
    "preference": pa.schema([("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS)]),
    "prompts": pa.schema([("prompt_ids", _IDS), ("prompt", pa.large_string())]),
}
EXAMPLES = pa.schema([(name, pa.large_string()) for name in ("prompt", "chosen", "rejected")])


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
