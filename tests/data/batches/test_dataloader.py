import itertools

import pytest
import torch
from torch.utils.data import Dataset

from utils.data.batches.dataloader import accumulation_groups, build_dataloader, endless
from utils.errors import InputError


class Numbers(Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"n": index}


def batches(count, *, rank=0, world_size=1, batch_size=2, epoch=0, start_batch=0, **options):
    options = {"shuffle": True, "seed": 3} | options
    loader = build_dataloader(Numbers(count), list, batch_size, rank=rank, world_size=world_size, **options)
    loader.set_epoch(epoch, start_batch)
    result = list(loader)
    assert len(result) == len(loader)
    return result


def real(rank_batches):
    return [row["n"] for batch in rank_batches for row in batch if not row.get("filler")]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "world_size"), [(7, 1), (8, 2), (7, 2), (5, 4), (1, 4), (9, 4)])
def test_every_row_counts_exactly_once_and_ranks_stay_in_step(count, world_size, shuffle):
    ranks = [batches(count, rank=rank, world_size=world_size, shuffle=shuffle) for rank in range(world_size)]
    assert sorted(n for rank in ranks for n in real(rank)) == list(range(count))
    assert len({tuple(len(batch) for batch in rank) for rank in ranks}) == 1


def test_without_shuffle_the_order_is_the_data_sets():
    assert real(batches(5, shuffle=False)) == [0, 1, 2, 3, 4]


def test_the_order_depends_on_seed_and_epoch_alone():
    assert real(batches(20, epoch=1)) == real(batches(20, epoch=1))
    assert real(batches(20, epoch=1)) != real(batches(20, epoch=2))
    assert real(batches(20, seed=3)) != real(batches(20, seed=4))
    torch.manual_seed(1)
    first = real(batches(20))
    torch.manual_seed(2)
    assert real(batches(20)) == first


def test_drop_last_gives_full_batches_and_drops_other_rows_in_the_next_epoch():
    ranks = [batches(11, rank=rank, world_size=2, drop_last=True) for rank in range(2)]
    assert [len(batch) for rank in ranks for batch in rank] == [2, 2, 2, 2]
    seen = [n for rank in ranks for n in real(rank)]
    assert len(seen) == len(set(seen)) == 8
    next_epoch = [batches(11, rank=rank, world_size=2, drop_last=True, epoch=1) for rank in range(2)]
    assert set(seen) != {n for rank in next_epoch for n in real(rank)}


def test_no_full_batch_is_an_error():
    with pytest.raises(InputError, match="3 rows make no batch of 2 rows on each of 2 processes"):
        batches(3, world_size=2, drop_last=True)


def test_two_ranks_share_the_global_batches_of_one():
    """The union of the ranks' k-th batches is the k-th batch of a single process with twice the batch size."""
    one = batches(16, batch_size=4)
    two = [batches(16, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    for k, batch in enumerate(one):
        assert {row["n"] for row in batch} == {row["n"] for rank in two for row in rank[k]}


def test_a_position_can_be_resumed():
    whole = batches(11, epoch=5)
    assert batches(11, epoch=5, start_batch=2) == whole[2:]
    assert batches(11, epoch=5, start_batch=6) == []


def test_the_share_is_that_of_this_process_unless_another_is_named(monkeypatch):
    monkeypatch.setattr("utils.parallel.distributed.rank", lambda: 1)
    monkeypatch.setattr("utils.parallel.distributed.world_size", lambda: 3)
    own = list(build_dataloader(Numbers(11), list, 2, shuffle=True, seed=3))
    assert own == batches(11, rank=1, world_size=3) != batches(11, rank=0, world_size=1)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_endless_batches_begin_anywhere(start):
    """From the middle of an epoch, at its end, and epochs later: the same batches follow as without the break."""

    def following(first: int) -> list:
        loader = build_dataloader(Numbers(10), list, 3, shuffle=True, seed=5, drop_last=True)
        loader.set_epoch(7, 2)  # whatever it was used for before
        return list(itertools.islice(endless(loader, first), 12 - first))

    assert following(start) == following(0)[start:]


def steps(start: int, end: int) -> list[tuple[int, int, list[list[int]]]]:
    """Step, epoch and row numbers of steps of two batches, of five in an epoch: three steps, the last a half."""
    loader = build_dataloader(Numbers(10), list, 2, shuffle=True, seed=5)
    loader.set_epoch(7, 2)  # whatever it was used for before
    groups = accumulation_groups(loader, 2, start, end)
    return [(step, epoch, [[row["n"] for row in batch] for batch in group]) for step, epoch, group in groups]


def test_accumulation_keeps_the_tail_of_an_epoch():
    whole = steps(0, 7)
    assert [(step, epoch, len(group)) for step, epoch, group in whole] == [
        *[(1, 0, 2), (2, 0, 2), (3, 0, 1)],
        *[(4, 1, 2), (5, 1, 2), (6, 1, 1)],
        (7, 2, 2),
    ]
    for epoch in range(2):
        batches = [batch for _, of, group in whole for batch in group if of == epoch]
        loader = build_dataloader(Numbers(10), list, 2, shuffle=True, seed=5)
        loader.set_epoch(epoch)
        assert batches == [[row["n"] for row in batch] for batch in loader]


@pytest.mark.parametrize("start", range(8))
def test_accumulation_begins_and_ends_anywhere(start):
    assert steps(start, 7) == steps(0, 7)[start:]
    assert steps(0, start) == steps(0, 7)[:start]


def test_loading_rows_leaves_the_random_stream_alone():
    state = torch.get_rng_state()
    list(build_dataloader(Numbers(10), list, 3, shuffle=True, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
