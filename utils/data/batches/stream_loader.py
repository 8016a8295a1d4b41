"""Batches of one rank from a stream: every row once per epoch over all ranks, from any batch on.

All ranks read the same examples in the same order, in blocks of `BLOCK`. Each tokenises its share of a block, and all
tell each other how many rows came of each example (of packed rows, how long they are). So all know the block's rows,
and of every world_size rows each rank takes one, as it does with rows that are prepared beforehand. The rows of the
n-th batch of all ranks do not depend on how many ranks there are.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from utils.data.batches.packing import best_fit
from utils.data.formats.example import Example
from utils.data.rows.streaming import StreamedRows
from utils.data.rows.token_rows import TokenRow
from utils.parallel import distributed

BLOCK = 512  # examples
FRUITLESS = 2000  # examples without a row, in whole epochs, after which there is no hope of another one
Slot = list[tuple[int, int]]  # a row of a batch: (example of the block, its row), several of them if packed
Collate = Callable[[Sequence[dict[str, Any]]], Any]


class StreamLoader:
    """Endless batches of `batch_size` rows for this rank, put together by `collate`.

    Attributes:
        epoch: of the last row of the last batch, counted from 0.
    """

    def __init__(
        self, rows: StreamedRows, collate: Collate, batch_size: int, *, seed: int, rank: int, world_size: int
    ) -> None:
        self._rows, self._collate, self._batch_size, self._seed = rows, collate, batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._examples = rows.examples(seed)
        self.position = {"window": self._examples.position, "epoch": 0, "block": 0, "rows": 0}

    def start_at(self, position: dict[str, Any]) -> None:
        """Go on where `position`, JSON values, was taken: with the batch after the last one that was given out."""
        self.position = position
        self._examples.start_at(position["window"])

    @property
    def epoch(self) -> int:
        return self.position["epoch"]

    def __iter__(self) -> Iterator[Any]:
        rows = self._places()
        while True:
            batch = []
            for number in range(self._batch_size * self._world_size):
                row, position = next(rows)
                if number % self._world_size == self._rank:
                    batch.append(row)
            self.position = position
            yield self._collate(batch)

    def _places(self) -> Iterator[tuple[TokenRow | None, dict[str, Any]]]:
        """The rows of all ranks from the position on, those of the others as None, each with the position behind it."""
        block, seen = self.position["block"], self.position["rows"]
        self._examples.start_at(self.position["window"])
        given, fruitless, ended, last_epoch = 0, 0, 0, None
        while True:
            begins = self._examples.position
            window = self._examples.next_window()
            epoch = self._examples.epoch
            if epoch != last_epoch:
                ended, last_epoch = ended + (last_epoch is not None), epoch
            if ended > 1 and fruitless >= FRUITLESS:  # at least one of the epochs was read from its beginning
                raise self._rows.refusal()
            before = given
            for start in range(block, len(window), BLOCK):
                for number, row in enumerate(self._block(window[start : start + BLOCK], seen, given), seen + 1):
                    given += 1
                    yield row, {"window": begins, "epoch": epoch, "block": start, "rows": number}
                seen = 0
            block = 0
            fruitless, ended = (0, 0) if given > before else (fruitless + len(window), ended)

    def _block(self, examples: Sequence[Example], seen: int, given: int) -> list[TokenRow | None]:
        """The rows of a block without the first `seen`, None for each that is another rank's.

        Args:
            given: rows so far, of which this rank had every world_size-th.
        """
        likely = range((self._rank - given + seen) % self._world_size, len(examples), self._world_size)
        known = self._tokenised(examples, likely)
        slots = self._slots(self._agreed_lengths(examples, known))[seen:]
        own = [slot if (given + number) % self._world_size == self._rank else None for number, slot in enumerate(slots)]
        missing = {example for slot in filter(None, own) for example, _ in slot} - known.keys()
        known |= self._tokenised(examples, sorted(missing))
        return [None if slot is None else self._row([known[example][row] for example, row in slot]) for slot in own]

    def _tokenised(self, examples: Sequence[Example], numbers: Sequence[int]) -> dict[int, list[TokenRow]]:
        rows = self._rows.tokenised([examples[number] for number in numbers])
        return dict(zip(numbers, rows, strict=True))

    def _row(self, rows: list[TokenRow]) -> TokenRow:
        return {"rows": rows} if self._rows.capacity else rows[0]

    def _agreed_lengths(self, examples: Sequence[Example], known: dict[int, list[TokenRow]]) -> list[list[int]]:
        """The length of each row of each example, of which this rank knows some. Every rank must call it.

        Lengths are only told where rows are packed by them, and 0 otherwise.
        """
        together = self._world_size == distributed.world_size()
        if not together:  # a rank that runs alone works out what the others would tell it
            known = self._tokenised(examples, range(len(examples)))
        counts = torch.zeros(len(examples), dtype=torch.long)
        for example, rows in known.items():
            counts[example] = len(rows)
        if together:
            counts = distributed.all_reduce(counts)
        lengths = torch.zeros(int(counts.sum()), dtype=torch.long)
        if self._rows.capacity:
            starts = (counts.cumsum(0) - counts).tolist()
            for example, rows in known.items():
                for number, row in enumerate(rows):
                    lengths[starts[example] + number] = len(row["input_ids"])
            if together:
                lengths = distributed.all_reduce(lengths)
        return [part.tolist() for part in lengths.split(counts.tolist())]

    def _slots(self, lengths: list[list[int]]) -> list[Slot]:
        """The rows of a block in their order; packed, that order is drawn, since packing has sorted them."""
        rows = [(example, row) for example, own in enumerate(lengths) for row in range(len(own))]
        if not self._rows.capacity:
            return [[row] for row in rows]
        bins = best_fit([length for own in lengths for length in own], self._rows.capacity)
        random.Random(distributed.derived_seed(self._seed, len(bins), len(rows))).shuffle(bins)
        return [[rows[index] for index in each] for each in bins]
