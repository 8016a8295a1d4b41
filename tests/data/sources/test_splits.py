from collections import Counter

import numpy as np
import pytest

from utils.arguments.data import split_weights
from utils.data.sources.splits import divide, part_of, phase_weights, split_sizes
from utils.errors import InputError


@pytest.mark.parametrize(
    ("rows", "weights", "sizes"),
    [
        (10, (2, 4, 4), [2, 4, 4]),
        (4, (2, 4, 4), [1, 2, 1]),  # rounding gives 0, 2, 2
        (3, (2, 4, 4), [1, 1, 1]),
        (5, (0, 1, 1), [0, 3, 2]),
        (7, (1, 0, 0), [7, 0, 0]),
        (3, (1000, 1, 1), [1, 1, 1]),
        (100, (1000, 1, 1), [98, 1, 1]),
        (1, (0.0, 0.3, 0.0), [0, 1, 0]),
    ],
)
def test_sizes_by_hand(rows, weights, sizes):
    assert split_sizes(rows, weights) == sizes


def test_sizes_always_add_up_and_no_wanted_part_is_empty():
    for rows in range(3, 60):
        for weights in ((2, 4, 4), (1, 1, 1), (6, 2, 2), (0.1, 0.2, 0.7), (0, 1, 9), (1e-6, 1, 1)):
            sizes = split_sizes(rows, weights)
            assert sum(sizes) == rows
            assert [size > 0 for size in sizes] == [weight > 0 for weight in weights]


def parts_of(prompts, weights=(2, 4, 4), *, seed=7, held_out_share=0.05, known=None) -> list[list[int]]:
    """The held-out rows, then those of the part of each weight."""
    found = divide(np.array(prompts), weights, seed=seed, held_out_share=held_out_share, known=known)
    return [part.tolist() for part in found]


@pytest.mark.parametrize("rows", [4, 20, 101])
def test_parts_and_held_out_rows_are_disjoint_and_cover_all_rows(rows):
    held_out, *parts = parts_of(range(100, 100 + rows))
    assert len(held_out) == max(1, round(rows * 0.05))
    assert [len(part) for part in parts] == split_sizes(rows - len(held_out), (2, 4, 4))
    assert sorted([*held_out, *(row for part in parts for row in part)]) == list(range(rows))


def test_the_seed_decides():
    first, again, other = (parts_of(range(100), (1, 1, 1), seed=seed, held_out_share=0.1)[1] for seed in (1, 1, 2))
    assert first == again != other
    # Frozen: steps run with different library versions must agree on which step has which row.
    assert parts_of(range(10), seed=1234)[:2] == [[7], [2, 9]]


def test_rows_with_the_same_prompt_stay_together():
    """Four pairs for each prompt, as in many preference sets."""
    prompts = [row // 4 * 11 for row in range(400)]
    order = np.random.RandomState(0).permutation(400)
    found = parts_of([prompts[row] for row in order])
    owners = [{prompts[order[row]] for row in part} for part in found]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 100
    assert [len(part) for part in found] == [20, 76, 152, 152]


def test_prompts_of_unequal_numbers_of_rows_are_divided_as_nearly_as_they_allow():
    prompts = [0] * 50 + list(range(1, 51))
    for seed in range(20):
        found = parts_of(prompts, (1, 1, 0), seed=seed, held_out_share=0.1)
        assert sorted(row for part in found for row in part) == list(range(100))
        assert found[3] == [] and all(found[:3])
        assert sum(bool({0} & {prompts[row] for row in part}) for part in found) == 1


def test_prompts_keep_the_part_that_another_source_gave_them():
    known: dict[int, int] = {}
    first = parts_of(range(100), known=known)
    part_of = {row: part for part, rows in enumerate(first) for row in rows}
    assert known == part_of
    for later in (list(range(50, 150)), [3, 5, 5, 3], list(range(99, -1, -1)), [7, 1000, 1001]):
        found = parts_of(later, seed=3, known=dict(known))
        assert sorted(row for part in found for row in part) == list(range(len(later)))
        for part, rows in enumerate(found):
            assert all(part_of.get(later[row], part) == part for row in rows)


def test_too_few_prompts():
    with pytest.raises(ValueError, match="3 rows cannot fill 4|2 rows cannot fill 3 parts"):
        parts_of(range(3))
    with pytest.raises(ValueError, match="0 rows cannot fill 1 parts"):
        parts_of([5], (1.0,))
    with pytest.raises(ValueError, match="2 prompts cannot fill 4 parts"):
        parts_of([5, 6] * 10)


@pytest.mark.parametrize("text", ["", "2,4", "2,4,4,1", "a,b,c", "2;4;4", "-1,2,3", "0,0,0", "nan,1,1", "inf,1,1"])
def test_what_is_not_three_weights(text):
    with pytest.raises(InputError, match="--data_split .*: expected three numbers like 2,4,4"):
        split_weights(text)


def test_a_step_without_a_share():
    assert phase_weights("2,4,4", "preference") == ((2, 4, 4), 1)
    assert phase_weights("0,1,0", "pretrain") == ((1.0,), 0)
    with pytest.raises(InputError, match=r"--data_split 0,5,5 leaves no rows for step 1 \(supervised fine-tuning\)"):
        phase_weights("0,5,5", "sft")
    with pytest.raises(InputError, match=r"step 3 \(PPO\)"):
        phase_weights("5,5,0", "prompts")


def test_a_prompt_that_is_drawn_by_itself_has_one_part_and_parts_have_their_shares():
    weights, prompts = (2.0, 0.0, 3.0), range(-10_000, 10_000)
    parts = [part_of(prompt, weights, seed=3, held_out_share=0.1) for prompt in prompts]
    counts = Counter(parts)
    assert set(counts) == {0, 1, 3}
    assert counts[0] == pytest.approx(2_000, rel=0.1)
    assert counts[1] == pytest.approx(7_200, rel=0.05) and counts[3] == pytest.approx(10_800, rel=0.05)
    # What is not held out keeps its part when nothing is, and another seed gives another division.
    without = [part_of(prompt, weights, seed=3, held_out_share=0) for prompt in prompts]
    assert all(part in (0, other) for part, other in zip(parts, without, strict=True)) and 0 not in without
    other = [part_of(prompt, weights, seed=4, held_out_share=0.1) for prompt in prompts]
    assert 0.3 < sum(map(int.__eq__, parts, other)) / len(parts) < 0.7
    assert {part_of(prompt, (1.0,), seed=3, held_out_share=0) for prompt in prompts} == {1}
