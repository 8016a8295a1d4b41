"""Masks come from lengths and the first EOS, and masked values have no effect."""

import pytest
import torch

from utils.algorithms.masking import (
    last_index,
    left_aligned,
    lengths_to_mask,
    masked_sum,
    position_ids,
    response_mask,
)

EOS = 2


def test_response_mask_ends_with_the_first_eos():
    tokens = torch.tensor(
        [
            [5, 6, EOS, 0, 0],  # padded with a token of its own
            [5, 6, EOS, EOS, EOS],  # padded with EOS, as is usual with LLaMA
            [EOS, 7, 7, 7, 7],  # ends immediately; what follows does not count
            [5, 6, 7, 8, EOS],  # EOS in the last column
            [5, 0, 7, 8, 9],  # cut by the length limit; the padding token's id may occur inside a response
        ]
    )
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    mask = response_mask(tokens, EOS)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == expected


def test_response_mask_does_not_depend_on_the_padding_token():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (64,), generator=generator)
    real = lengths_to_mask(lengths, 8)
    tokens = torch.randint(3, 20, (64, 8), generator=generator)
    tokens[torch.arange(64), lengths - 1] = EOS
    for padding in (0, 1, EOS, 7):
        assert torch.equal(response_mask(torch.where(real, tokens, padding), EOS), real)


def test_lengths_to_mask():
    mask = lengths_to_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.tolist() == [[False, False, False], [True, True, False], [True, True, True]]


def test_left_aligned_rows_begin_with_their_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    ids = torch.arange(16).view(4, 4)
    aligned, moved = left_aligned(mask, ids)
    assert aligned.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert moved[0, :2].tolist() == [2, 3] and moved[1, :2].tolist() == [5, 6] and moved[2].tolist() == [8, 9, 10, 11]


def test_position_ids_count_real_tokens_on_either_side_of_the_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]
    assert torch.equal(position_ids(mask.bool()), position_ids(mask))


def test_last_index():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert last_index(mask).tolist() == [1, 0, 3, 2, -1]


def test_masked_sum():
    x = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), float("-inf")]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_sum(x, mask).item() == 7.0
    assert masked_sum(x, mask, dim=1).tolist() == [3.0, 4.0]
    assert masked_sum(x, torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype):
    x = torch.full((1, 1000), 1000.0, dtype=dtype)
    total = masked_sum(x, torch.ones(1, 1000, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == 1_000_000.0
