"""Rows filled with examples, and micro-batches filled with tokens."""

import random

import pytest
from processes import run_ranks

from utils.data.batches.packing import PackedRows, best_fit, micro_batches, split_by_tokens, token_batches, unpack
from utils.data.batches.sizes import sequence_tokens


def test_best_fit_by_hand():
    # 7 | 6 | 4 goes beside 6 | 3 beside 7 | 2 fits nowhere | 1 would fit beside 2
    assert best_fit([2, 7, 4, 3, 6, 1], capacity=10) == [[1, 3], [4, 2], [0, 5]]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_holds_every_example_once_overfills_nothing_and_stays_near_the_optimum(seed):
    generator = random.Random(seed)
    lengths = [generator.randint(1, 512) for _ in range(300)]
    rows = best_fit(lengths, 512)
    assert sorted(index for row in rows for index in row) == list(range(300))
    assert all(sum(lengths[index] for index in row) <= 512 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 512) + 1


def test_an_example_longer_than_a_row_has_one_of_its_own():
    assert best_fit([12, 3], capacity=10) == [[0], [1]]


def test_packed_rows_give_their_examples_and_fillers_stay_fillers():
    packed = PackedRows(["a", "bb", "ccc"], [1, 2, 3], 3)
    assert len(packed) == 2 and packed.fill == 1.0
    assert [packed[index] for index in range(2)] == [{"rows": ["ccc"]}, {"rows": ["bb", "a"]}]
    row = {"rows": [{"input_ids": [1]}, {"input_ids": [2]}], "filler": True}
    assert unpack(row) == [{"input_ids": [1], "filler": True}, {"input_ids": [2], "filler": True}]
    assert unpack({"input_ids": [1]}) == [{"input_ids": [1]}]


def test_split_by_tokens_by_hand():
    assert split_by_tokens([2, 5, 4, 1, 3], 8) == [[1], [2, 4], [0, 3]]
    assert split_by_tokens([2, 5, 4, 1, 3], 100) == [[1, 2, 4, 0, 3]]
    assert split_by_tokens([2, 5, 4, 1, 3], 100, least=3) == [[1, 2], [4], [0, 3]]
    assert split_by_tokens([9, 9], 4) == [[0], [1]]
    assert split_by_tokens([1, 1], 4, least=5) == [[0], [1]]


def test_micro_batches_are_the_batches_or_what_the_budget_makes_of_them():
    rows = [{"input_ids": [0] * length} for length in (1, 2, 3, 4)]
    batches = [[rows[0], {"rows": [rows[1], rows[2]]}], [rows[3]]]

    def lengths(max_tokens):
        parts = micro_batches(batches, max_tokens, sequence_tokens)
        return [[len(row["input_ids"]) for row in part] for part in parts]

    assert lengths(0) == [[1, 2, 3], [4]]
    assert lengths(7) == [[2, 3], [4, 1]]  # the packed row is one of 5 tokens
    assert micro_batches([], 7, len) == []


ROWS = [[[8], [8]], [[5, 3], [5, 3]]]  # lengths of the examples in the packed rows of each rank


def ranks_split(budget: int) -> tuple[list[list[int]], list[list[int]]]:
    from utils.parallel import distributed

    distributed.init_distributed()
    rank = distributed.rank()
    parts = token_batches([[4, 4, 4, 4], [1, 1, 1, 1]][rank], budget)
    rows = [{"rows": [{"tokens": tokens} for tokens in row]} for row in ROWS[rank]]
    packed = micro_batches([rows], budget + 1, lambda row: sum(example["tokens"] for example in row["rows"]))
    return parts, [[row["tokens"] for row in part] for part in packed]


def test_ranks_agree_on_the_number_of_micro_batches():
    """Also where their packed rows hold different numbers of examples, which alone would need other numbers."""
    (first, first_packed), (second, second_packed) = run_ranks(ranks_split, 2, 8)
    assert first == [[0, 1], [2, 3]] and second == [[0, 1], [2, 3]]
    assert first_packed == [[8], [8]] and second_packed == [[5, 3], [5, 3]]
