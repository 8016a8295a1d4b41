"""Batches of prompts whose pairs come together."""

import numpy as np
import pytest
from torch.utils.data import Dataset

from utils.data.batches.dataloader import accumulation_groups, build_dataloader
from utils.data.batches.packing import micro_batches

# 7 prompts with 1, 6, 3, 1, 10, 2 and 3 pairs, whose rows lie apart.
GROUPS = np.random.RandomState(0).permutation(np.repeat(np.arange(7), [1, 6, 3, 1, 10, 2, 3]))


class Numbers(Dataset):
    def __len__(self) -> int:
        return len(GROUPS)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"n": index}


def steps_of(world_size: int, batch_size: int, accumulation: int = 1, start: int = 0, end: int = 6) -> list[list[list]]:
    """For each optimiser step, the batches of each rank."""
    ranks = []
    for rank in range(world_size):
        loader = build_dataloader(
            Numbers(), list, batch_size, shuffle=True, seed=3, rank=rank, world_size=world_size, groups=GROUPS
        )
        ranks.append([batches for _, _, batches in accumulation_groups(loader, accumulation, start, end)])
    return [list(step) for step in zip(*ranks, strict=True)]


def real(batches: list[list[dict]]) -> list[int]:
    return sorted(row["n"] for batch in batches for row in batch if not row.get("filler"))


@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), [(1, 2, 1), (2, 1, 1), (1, 1, 2), (3, 2, 1)])
def test_all_pairs_of_a_prompt_come_in_one_step_and_every_pair_once(world_size, batch_size, accumulation):
    prompts_of_a_step = world_size * batch_size * accumulation
    per_epoch = -(-7 // prompts_of_a_step)
    steps = steps_of(world_size, batch_size, accumulation, end=2 * per_epoch)
    assert len(steps) == 2 * per_epoch
    epochs = [steps[:per_epoch], steps[per_epoch:]]
    for epoch in epochs:
        rows = [real([batch for rank in step for batch in rank]) for step in epoch]
        assert sorted(sum(rows, [])) == list(range(len(GROUPS)))
        for some in rows:
            prompts = set(GROUPS[some])
            assert len(prompts) <= prompts_of_a_step
            assert some == sorted(np.flatnonzero(np.isin(GROUPS, list(prompts))))  # whole prompts
        for step in epoch:  # collectives match
            assert len({tuple(len(batch) for batch in rank) for rank in step}) == 1
            fillers = sum(bool(row.get("filler")) for rank in step for batch in rank for row in batch)
            assert fillers < world_size * accumulation
    assert real(epochs[0][0][0]) != real(epochs[1][0][0])


def test_a_step_has_the_same_pairs_on_any_number_of_processes_and_after_a_resume():
    whole = [real([batch for rank in step for batch in rank]) for step in steps_of(1, 4)]
    for options in ((2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)):
        assert [real([batch for rank in step for batch in rank]) for step in steps_of(*options)] == whole
        assert steps_of(*options, start=3) == steps_of(*options)[3:]


def test_micro_batches_hold_no_more_rows_than_asked_for():
    rows = [{"n": n} for n in range(7)]
    assert [len(part) for part in micro_batches([rows, rows[:2]], 0, len, 3)] == [3, 3, 1, 2]
    assert micro_batches([rows], 0, len) == [rows]
