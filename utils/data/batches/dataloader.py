"""Batches for one rank: the same order on every machine for the same seed and epoch, and no row counted twice."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.batches.stream_loader import StreamLoader
from utils.data.rows.streaming import StreamedRows
from utils.errors import InputError
from utils.parallel import distributed

Collate = Callable[[Sequence[dict[str, Any]]], Any]


def rows_per_rank(rows: int, batch_size: int, world_size: int, *, drop_last: bool) -> int:
    """Rows of an epoch on each rank: only whole batches with `drop_last`, else all of them, filled up to be equal."""
    return rows // (batch_size * world_size) * batch_size if drop_last else math.ceil(rows / world_size)


def batches_per_epoch(rows: int, batch_size: int, world_size: int, *, drop_last: bool = False) -> int:
    """Batches of an epoch on each rank."""
    return math.ceil(rows_per_rank(rows, batch_size, world_size, drop_last=drop_last) / batch_size)


def row_numbers(count: int) -> range:
    """Numbers, in the batch of all ranks, of the first `count` rows of this rank's batch: every world_size-th."""
    rank, world_size = distributed.rank(), distributed.world_size()
    return range(rank, rank + count * world_size, world_size)


class RankBatches(Sampler[list[tuple[int, bool]]]):
    """The batches of one rank, as lists of (row number, whether it is a filler).

    All ranks shuffle alike and take every world_size-th row. Every rank yields the same number of batches, of the same
    sizes, so that collectives inside a forward pass match. Where rows do not divide evenly, filler rows complete the
    last batch or its rows are dropped (others in the next epoch).
    """

    def __init__(
        self, rows: int, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool, rank: int, world_size: int
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.rows_per_rank = rows_per_rank(rows, batch_size, world_size, drop_last=drop_last)
        self.epoch, self.start_batch = 0, 0

    def __len__(self) -> int:
        return math.ceil(self.rows_per_rank / self.batch_size) - self.start_batch

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        order = self._order()
        positions = range(self.rank, self.rows_per_rank * self.world_size, self.world_size)
        for start in range(self.start_batch * self.batch_size, len(positions), self.batch_size):
            own = positions[start : start + self.batch_size]
            yield [(order[position % self.rows], position >= self.rows) for position in own]

    def _order(self) -> Sequence[int]:
        """The rows of the epoch in their order."""
        generator = torch.Generator().manual_seed(distributed.derived_seed(self.seed, self.epoch))
        return torch.randperm(self.rows, generator=generator).tolist() if self.shuffle else range(self.rows)


class PromptBatches(RankBatches):
    """The same for pairs that belong to prompts: a batch has all pairs of `batch_size` prompts for each rank.

    The prompts of a batch of all ranks are those that `RankBatches` would give as rows, and their pairs are dealt out
    to the ranks one by one; filler rows make them equally many. So all pairs of a prompt come in one optimiser step,
    and a step has the same prompts whatever the number of ranks. The last batch may have fewer prompts.

    Args:
        groups: (rows,) the number of each row's prompt.
    """

    def __init__(self, groups: np.ndarray, batch_size: int, **options: Any) -> None:
        by_prompt = np.argsort(groups, kind="stable")
        ends = np.cumsum(np.bincount(groups))
        self._rows_of = [rows.tolist() for rows in np.split(by_prompt, ends[:-1])]
        super().__init__(len(self._rows_of), batch_size, drop_last=False, **options)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        order, size = self._order(), self.batch_size * self.world_size
        for start in range(self.start_batch * size, self.rows, size):
            rows = [row for prompt in order[start : start + size] for row in self._rows_of[prompt]]
            count = math.ceil(len(rows) / self.world_size) * self.world_size
            places = [(rows[place % len(rows)], place >= len(rows)) for place in range(count)]
            yield places[self.rank :: self.world_size]


class _MarkedRows(Dataset):
    """Rows by (row number, filler): a filler row carries `"filler": True` for the collate function."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __getitem__(self, place: tuple[int, bool]) -> dict[str, Any]:
        index, is_filler = place
        row = self.rows[index]
        return {**row, "filler": True} if is_filler else row


class RankDataLoader(DataLoader):
    """A DataLoader over one rank's batches, whose order `set_epoch` sets."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Shuffle as epoch `epoch` does, and begin at its batch `start_batch` without loading those before.

        Rows that differ from epoch to epoch, as those of weighted sources do, change to those of that epoch.
        """
        self.batch_sampler.epoch, self.batch_sampler.start_batch = epoch, start_batch
        if set_epoch := getattr(self.dataset.rows, "set_epoch", None):
            set_epoch(epoch)


Loader = RankDataLoader | StreamLoader


def endless(loader: Loader, start: int = 0) -> Iterator[Any]:
    """The batches of `loader` from the `start`-th on, epoch after epoch, each in its own order.

    A stream goes on at its position, which is what counts there.
    """
    if isinstance(loader, StreamLoader):
        yield from loader
    loader.set_epoch(0)
    first_epoch, start_batch = divmod(start, len(loader))
    for epoch in itertools.count(first_epoch):
        loader.set_epoch(epoch, start_batch)
        yield from loader
        start_batch = 0


def numbered_batches(loader: Loader, start: int, end: int) -> Iterator[tuple[int, Any]]:
    """The batches of `loader` after the `start`-th up to the `end`-th, epoch after epoch, with their numbers from 1."""
    batches = endless(loader, start)
    for number in range(start + 1, end + 1):
        yield number, next(batches)


def accumulation_groups(
    loader: Loader, accumulation_steps: int, start: int, end: int
) -> Iterator[tuple[int, int, list]]:
    """For each optimiser step after the `start`-th up to the `end`-th: its number, its epoch and its batches.

    Steps count from 1, epochs from 0; each epoch has its own order. The last step of an epoch may have fewer batches
    than `accumulation_steps`. A stream goes on at its position, and its steps are all full.
    """
    if isinstance(loader, StreamLoader):
        batches = iter(loader)
        for step in range(start, end):
            group = list(itertools.islice(batches, accumulation_steps))
            yield step + 1, loader.epoch, group
        return
    loader.set_epoch(0)
    steps_per_epoch = math.ceil(len(loader) / accumulation_steps)
    for epoch in range(start // steps_per_epoch, math.ceil(end / steps_per_epoch)):
        steps = range(max(start, epoch * steps_per_epoch), min(end, (epoch + 1) * steps_per_epoch))
        loader.set_epoch(epoch, steps.start % steps_per_epoch * accumulation_steps)
        batches = iter(loader)
        for step in steps:
            yield step + 1, epoch, list(itertools.islice(batches, accumulation_steps))


def build_dataloader(
    dataset: Dataset | StreamedRows,
    collate: Collate,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    drop_last: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    size_flags: str = "the batch size",
    groups: np.ndarray | None = None,
) -> Loader:
    """Batches of `batch_size` rows of this rank's share of `dataset`, put together by `collate`.

    Without `drop_last` every row comes exactly once over all ranks; where rows do not divide by `world_size`, filler
    rows (`row["filler"]`, see `collate`) keep ranks in step and are masked out of losses and metrics. With `drop_last`
    all batches are full, and the rows left over change from epoch to epoch. Those of a stream are always full and in
    random order: the batch in which an epoch ends goes on with the next one.

    Args:
        rank, world_size: whose share; if omitted, this process's.
        size_flags: what sets the batch size, for the message.
        groups: (rows,) the number of each row's prompt, where all rows of a prompt are to come in one batch of all
            ranks (`PromptBatches`); `batch_size` then counts prompts, and `drop_last` is not supported.

    Raises:
        InputError: `drop_last` would leave no batch.
    """
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    if isinstance(dataset, StreamedRows):
        return StreamLoader(dataset, collate, batch_size, seed=seed, rank=rank, world_size=world_size)
    options = {"shuffle": shuffle, "seed": seed, "rank": rank, "world_size": world_size}
    if groups is None:
        sampler = RankBatches(len(dataset), batch_size, drop_last=drop_last, **options)
    else:
        sampler = PromptBatches(groups, batch_size, **options)
    if not len(sampler):
        raise InputError(
            f"{len(dataset)} rows make no batch of {batch_size} rows on each of {world_size} processes; "
            f"lower {size_flags} or add data"
        )
    return RankDataLoader(
        _MarkedRows(dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        generator=torch.Generator(),  # separate: loading rows must not advance the random stream that dropout uses
    )
