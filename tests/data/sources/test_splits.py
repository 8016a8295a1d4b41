import numpy as np
import pytest

from utils.arguments.data import split_weights
from utils.data.sources.splits import divide, phase_weights, split_sizes
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


@pytest.mark.parametrize("rows", [4, 20, 101])
def test_parts_and_held_out_rows_are_disjoint_and_cover_all_rows(rows):
    parts = [divide(rows, (2, 4, 4), part, seed=7, held_out_share=0.05) for part in range(3)]
    held_out = parts[0][1]
    assert all(np.array_equal(other, held_out) for _, other in parts)
    assert len(held_out) == max(1, round(rows * 0.05))
    assert sorted(np.concatenate([held_out, *(part for part, _ in parts)])) == list(range(rows))


def test_the_seed_decides():
    first, again, other = (divide(100, (1, 1, 1), 0, seed, 0.1)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    # Frozen: steps run with different library versions must agree on who has which row.
    assert divide(10, (2, 4, 4), 0, 1234, 0.05)[0].tolist() == [2, 9]
    assert divide(10, (2, 4, 4), 0, 1234, 0.05)[1].tolist() == [7]


def test_too_few_rows():
    with pytest.raises(ValueError, match="3 rows cannot fill 4|2 rows cannot fill 3 parts"):
        divide(3, (2, 4, 4), 0, 0, 0.05)
    with pytest.raises(ValueError, match="0 rows cannot fill 1 parts"):
        divide(1, (1.0,), 0, 0, 0.05)


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
