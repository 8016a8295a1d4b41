import pytest
import torch

from utils.data.batches.collate import collate_preference, collate_sft, pad

T, F = True, False
PAD = 2  # equal to EOS on purpose: masks must not look at ids


def test_sft_masks_are_the_response_with_its_eos():
    batch = collate_sft(
        [{"input_ids": [1, 5, 6, 7, 2], "response_start": 3}, {"input_ids": [1, 8, 2], "response_start": 2}], PAD
    )
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2], [1, 8, 2, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["target_mask"].tolist() == [[F, F, F, T, T], [F, F, T, F, F]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long
    assert batch["target_mask"].dtype == torch.bool


def test_the_first_column_is_never_a_target():
    batch = collate_sft([{"input_ids": [5, 6, 2], "response_start": 0}], PAD)
    assert batch["target_mask"].tolist() == [[F, T, T]]


def test_a_filler_row_has_no_targets():
    row = {"input_ids": [1, 5, 2], "response_start": 1}
    batch = collate_sft([row, {**row, "filler": True}], PAD)
    assert batch["target_mask"].tolist() == [[F, T, T], [F, F, F]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_pairs_become_one_batch_chosen_first():
    rows = [
        {"prompt_ids": [1, 5], "chosen_ids": [6, 2], "rejected_ids": [7, 8, 9], "margin": 0.75, "source": 2},
        {"prompt_ids": [1], "chosen_ids": [6, 2], "rejected_ids": [2], "filler": True},
    ]
    batch = collate_preference(rows, 0)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 2, 0], [1, 6, 2, 0, 0], [1, 5, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 3, 5, 2]
    assert batch["response_mask"].tolist() == [[F, F, T, T, F], [F, T, T, F, F], [F, F, T, T, T], [F, T, F, F, F]]
    assert batch["row_mask"].tolist() == [True, False]
    assert batch["margin"].tolist() == [0.75, 0.0] and batch["margin"].dtype == torch.float32
    assert batch["source"].tolist() == [2, 0] and batch["source"].dtype == torch.long
    without = collate_preference([row | {"margin": None} for row in rows], 0)
    assert without["margin"].tolist() == [0.0, 0.0]


def test_prompts_are_padded_on_the_left():
    ids, mask = pad([[1, 5, 6], [1, 2]], PAD, left=True)
    assert ids.tolist() == [[1, 5, 6], [PAD, 1, 2]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("pad_id", [0, 1, 2, 7])
def test_masks_do_not_depend_on_the_pad_id(pad_id):
    rows = [{"input_ids": [1, 7, 7, 2], "response_start": 2}, {"input_ids": [1, 7], "response_start": 1}]
    batch = collate_sft(rows, pad_id)
    assert batch["target_mask"].tolist() == [[F, F, T, T], [F, T, F, F]]
