"""Packing by length: several examples into a row, and rows into micro-batches of a limited number of tokens."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from utils.arguments.supervised import SftArguments
from utils.data.rows.dataset import TokenDataset
from utils.data.rows.streaming import StreamedRows
from utils.parallel import distributed

Row = dict[str, Any]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the examples in each row of `capacity` tokens: longest first, each into the fullest row it fits.

    Best-fit decreasing needs at most 11/9 of the least possible number of rows, plus one (Johnson 1973). An example
    that is longer than `capacity` gets a separate row.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens -> indices of the rows with that many
    spaces: list[int] = []  # the keys of `with_space`, ascending
    for example in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        place = bisect.bisect_left(spaces, lengths[example])
        if place < len(spaces):
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
            rows[row].append(example)
        else:
            row, space = len(rows), capacity
            rows.append([example])
        space -= lengths[example]
        if space > 0:
            if space not in with_space:
                bisect.insort(spaces, space)
            with_space.setdefault(space, []).append(row)
    return rows


class PackedRows(Dataset):
    """Rows of up to `capacity` tokens, each a `{"rows": [...]}` of examples of `dataset` (see `unpack`).

    Attributes:
        fill: mean share of a row that is filled with tokens.
    """

    def __init__(self, dataset: Dataset, lengths: Sequence[int], capacity: int) -> None:
        self.dataset, self.capacity = dataset, capacity
        self.examples = best_fit(lengths, capacity)
        self.fill = sum(lengths) / (len(self.examples) * capacity)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        return {"rows": [self.dataset[example] for example in self.examples[index]]}


def pack_rows(
    dataset: TokenDataset | StreamedRows, config: SftArguments, capacity: int
) -> TokenDataset | PackedRows | StreamedRows:
    """`dataset`, with `--packing` in rows of `capacity` tokens."""
    if not config.packing:
        return dataset
    if isinstance(dataset, StreamedRows):
        return dataset.packed(capacity)
    packed = PackedRows(dataset, dataset.lengths(), capacity)
    remark = "; with the weights of --data_path, every epoch has the same ones" if dataset.has_other_rows else ""
    distributed.log(f"--packing: {len(packed)} rows of {capacity} tokens, {packed.fill:.0%} full{remark}")
    return packed


def unpack(row: Row) -> list[Row]:
    """The examples of a packed row, or a list of the one that an ordinary row is; fillers stay fillers."""
    if "rows" not in row:
        return [row]
    return [{**example, "filler": True} if row.get("filler") else example for example in row["rows"]]


def split_by_tokens(lengths: Sequence[int], max_tokens: int, least: int = 1) -> list[list[int]]:
    """Indices of the rows of each micro-batch of at most `max_tokens` tokens, the longest rows first.

    There are at least `least` micro-batches, as long as there are that many rows.
    """
    parts, tokens = [], 0
    for row in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not parts or tokens + lengths[row] > max_tokens:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += lengths[row]
    while len(parts) < min(least, len(lengths)):
        largest = max(range(len(parts)), key=lambda index: len(parts[index]))
        half = len(parts[largest]) // 2
        parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
    return parts


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """`split_by_tokens`, into the same number of micro-batches on every rank, since each involves collectives.

    Every rank must call it with the same number of rows.
    """
    agreed = distributed.all_reduce_scalar(len(split_by_tokens(lengths, max_tokens)), "max")
    return split_by_tokens(lengths, max_tokens, int(agreed))


def micro_batches(
    batches: Sequence[Sequence[Row]], max_tokens: int, tokens_of: Callable[[Row], int], most_rows: int = 0
) -> list[list[Row]]:
    """The examples of an optimiser step in micro-batches: those of `batches`, or regrouped by `max_tokens` if above 0.

    A packed row stays whole: ranks have equally many rows, but not equally many examples in them.

    Args:
        most_rows: of a micro-batch that is not regrouped: `batches` that count prompts have more; 0 for no limit.
        tokens_of: number of tokens of a row in a forward pass.
    """
    if max_tokens and batches:
        rows = [row for batch in batches for row in batch]
        tokens = [tokens_of(row) for row in rows]
        batches = [[rows[index] for index in part] for part in token_batches(tokens, max_tokens)]
    elif most_rows:
        batches = [rows[start : start + most_rows] for rows in batches for start in range(0, len(rows), most_rows)]
    return [[example for row in batch for example in unpack(row)] for batch in batches]
