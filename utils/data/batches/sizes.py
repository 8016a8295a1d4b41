"""Size of a row of each purpose in a forward pass: tokens, length of its longest sequence, predicted tokens."""

import heapq
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

from utils.data.batches.packing import PackedRows, unpack
from utils.data.formats.example import Purpose
from utils.data.rows.dataset import TokenDataset
from utils.data.rows.streaming import StreamedRows

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSize:
    """The size of one row."""

    tokens: int
    width: int  # of its longest sequence
    targets: int  # tokens whose log-probabilities a language model computes


@dataclass(frozen=True)
class RowKind:
    """Rows of one purpose.

    Attributes:
        weight: tokens of a row, by which micro-batches are filled.
        weights: the same for a whole data set, read without the ids.
        size: of a row to which generation adds `answer` tokens.
        longest: the largest size that the flags allow: sequences of `length` tokens, `answer` of them generated.
    """

    weight: Callable[[Row], int]
    weights: Callable[[TokenDataset], list[int]]
    size: Callable[[Row, int], RowSize]
    longest: Callable[[int, int], RowSize]


def rows_drawn(dataset: Sized | StreamedRows) -> int | None:
    """What batch sizes count in an epoch: the prompts, where all pairs of a prompt come together, else the rows.

    None for a stream, whose rows nobody has counted.
    """
    if isinstance(dataset, StreamedRows):
        return None
    groups = getattr(dataset, "groups", None)
    return len(dataset) if groups is None else int(groups.max()) + 1


def sequence_tokens(row: Row) -> int:
    """Tokens of a row of purpose "sft" or "pretrain"; of a packed one, of all its examples."""
    return sum(len(example["input_ids"]) for example in unpack(row))


def pair_tokens(row: Row) -> int:
    """Tokens of both sequences of a pair; the prompt counts twice, though most architectures compute it once."""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def labelled_tokens(row: Row) -> int:
    """Tokens of a prompt and its judged answer."""
    return len(row["prompt_ids"]) + len(row["response_ids"])


def _sequence_size(row: Row, answer: int) -> RowSize:
    tokens = len(row["input_ids"])
    spans = row.get("target_spans") or [row["response_start"], tokens]
    return RowSize(tokens, tokens, sum(end - max(start, 1) for start, end in zip(spans[::2], spans[1::2])))


def _pair_weights(dataset: TokenDataset) -> list[int]:
    columns = (dataset.lengths(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [2 * prompt + chosen + rejected for prompt, chosen, rejected in zip(*columns, strict=True)]


def _pair_size(row: Row, answer: int) -> RowSize:
    width = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return RowSize(pair_tokens(row), width, len(row["chosen_ids"]) + len(row["rejected_ids"]))


def _labelled_size(row: Row, answer: int) -> RowSize:
    tokens = labelled_tokens(row)
    return RowSize(tokens, tokens, len(row["response_ids"]))


def _prompt_size(row: Row, answer: int) -> RowSize:
    tokens = len(row["prompt_ids"]) + answer
    return RowSize(tokens, tokens, answer)


SEQUENCES = RowKind(
    weight=sequence_tokens,
    weights=lambda dataset: dataset.lengths(),
    size=_sequence_size,
    longest=lambda length, answer: RowSize(length, length, length),
)
ROW_KINDS: dict[Purpose, RowKind] = {
    "sft": SEQUENCES,
    "pretrain": SEQUENCES,
    "preference": RowKind(
        weight=pair_tokens,
        weights=_pair_weights,
        size=_pair_size,
        longest=lambda length, answer: RowSize(2 * length, length, 2 * length),
    ),
    "labelled": RowKind(
        weight=labelled_tokens,
        weights=lambda dataset: [
            prompt + response
            for prompt, response in zip(dataset.lengths("prompt_ids"), dataset.lengths("response_ids"), strict=True)
        ],
        size=_labelled_size,
        longest=lambda length, answer: RowSize(length, length, length),
    ),
    "prompts": RowKind(
        weight=lambda row: len(row["prompt_ids"]),
        weights=lambda dataset: dataset.lengths("prompt_ids"),
        size=_prompt_size,
        longest=lambda length, answer: RowSize(length, length, answer),
    ),
}


@dataclass(frozen=True)
class Rows:
    """The sizes of a data set that determine memory, and its number of rows, or prompts (`rows_drawn`); None: unknown.

    The heaviest rows are in order.
    """

    count: int | None
    heaviest: tuple[RowSize, ...] = ()


def measure_rows(
    dataset: TokenDataset | PackedRows | StreamedRows, purpose: Purpose, needed: int, answer: int = 0
) -> Rows:
    """The number of rows of `dataset` in an epoch, and the sizes of its `needed` heaviest ones in any epoch.

    Args:
        answer: tokens that generation adds to a prompt.
    """
    if isinstance(dataset, StreamedRows):
        return Rows(None)
    if isinstance(dataset, PackedRows):
        full = SEQUENCES.longest(dataset.capacity, 0)
        return Rows(len(dataset), (full,) * min(needed, len(dataset)))
    kind, rows = ROW_KINDS[purpose], dataset.of_all_epochs()
    weights = kind.weights(rows)
    heaviest = heapq.nlargest(needed, range(len(weights)), key=weights.__getitem__)
    return Rows(rows_drawn(dataset), tuple(kind.size(rows[index], answer) for index in heaviest))
