"""How much one micro-batch brings to a forward pass: tokens, sequences and predicted tokens, at the heaviest."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.data import PackedRows, TokenDataset


@dataclass(frozen=True)
class RowSize:
    """What one row brings to a forward pass."""

    tokens: int
    width: int  # of its longest sequence
    targets: int  # tokens whose log-probabilities are computed


@dataclass(frozen=True)
class Rows:
    """A data set as far as memory is concerned: its number of rows (None: unknown) and its heaviest ones, first."""

    count: int | None
    heaviest: tuple[RowSize, ...] = ()


@dataclass(frozen=True)
class MicroBatch:
    """The heaviest micro-batch of a process, and how many of its like make an optimiser step."""

    tokens: int
    sequences: int
    width: int
    targets: int
    per_step: int

    @property
    def fill(self) -> float:
        """Share of `sequences` x `width` that holds tokens."""
        return self.tokens / (self.sequences * self.width)


def measure_rows(dataset: TokenDataset | PackedRows, step: int, needed: int, capacity: int) -> Rows:
    """The size of `dataset` and its `needed` heaviest rows.

    Args:
        step: 1, 2 or 3, whose rows they are.
        capacity: `--max_seq_len`, what a packed row holds; in step 3 the tokens that an answer adds to its prompt.
    """
    if isinstance(dataset, PackedRows):
        return Rows(len(dataset), (RowSize(capacity, capacity, capacity),) * min(needed, len(dataset)))
    if step == 1:
        weights = dataset.lengths()
    elif step == 2:
        columns = (dataset.lengths(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        weights = [2 * prompt + chosen + rejected for prompt, chosen, rejected in zip(*columns, strict=True)]
    else:
        weights = dataset.lengths("prompt_ids")
    chosen_rows = heapq.nlargest(needed, range(len(weights)), key=weights.__getitem__)
    return Rows(len(dataset), tuple(_row_size(dataset[index], step, capacity) for index in chosen_rows))


def _row_size(row: dict[str, Any], step: int, answer: int) -> RowSize:
    if step == 1:
        tokens = len(row["input_ids"])
        return RowSize(tokens, tokens, tokens - max(row["response_start"], 1))
    prompt = len(row["prompt_ids"])
    if step == 2:
        chosen, rejected = len(row["chosen_ids"]), len(row["rejected_ids"])
        return RowSize(2 * prompt + chosen + rejected, prompt + max(chosen, rejected), 0)
    return RowSize(prompt + answer, prompt + answer, answer)


def longest_row(step: int, length: int, answer: int = 0) -> RowSize:
    """The heaviest row that the flags allow: `length` tokens to a sequence, in step 3 `answer` of them an answer's."""
    if step == 1:
        return RowSize(length, length, length)
    if step == 2:
        return RowSize(2 * length, length, 0)
    return RowSize(length, length, answer)


def micro_batch(
    heaviest: Sequence[RowSize], fallback: RowSize, *, rows: int, steps: int, max_tokens: int
) -> MicroBatch:
    """The heaviest micro-batch that can occur.

    Args:
        heaviest: the heaviest rows known, heaviest first; `fallback` stands in where they are too few.
        rows: of a micro-batch. steps: micro-batches of an optimiser step.
        max_tokens: `--max_tokens_per_batch`: rows of the whole step are regrouped into micro-batches of that many.
    """
    known = list(heaviest) or [fallback]
    size = rows * steps if max_tokens else rows
    group = [known[index % len(known)] for index in range(size)]
    tokens, targets = sum(row.tokens for row in group), sum(row.targets for row in group)
    width = max(row.width for row in group)
    if max_tokens:
        steps = max(1, math.ceil(tokens / max_tokens))
        if tokens > max_tokens:
            tokens, targets = max_tokens, math.ceil(targets * max_tokens / tokens)
    return MicroBatch(tokens, max(1, math.ceil(tokens / width)), width, targets, steps)
