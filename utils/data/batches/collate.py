"""From dataset rows to padded batches. Masks come from the lengths of the rows, never from comparing ids with pad.

Notation: B rows, T columns (the longest row of the batch). All ids are int64. `attention_mask` is
int64 with 1 on tokens, 0 on padding; the other masks are bool.

A row with `"filler": True` repeats another row only to give every rank the same number of batches (see
utils.data.batches.dataloader); masks say that it does not count.
"""

from collections.abc import Sequence
from typing import Any

import torch

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


def pad(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and attention mask (B, T) of sequences of different lengths, padded on the right (or the left)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if left else 0
        ids[row, start : start + len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
    columns = torch.arange(width)
    first = (width - lengths)[:, None] if left else torch.zeros(len(sequences), 1, dtype=torch.long)
    return ids, ((columns >= first) & (columns < first + lengths[:, None])).long()


def _span_mask(starts: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool, true from column starts[b] to the end of row b."""
    columns = torch.arange(attention_mask.shape[1])
    return (columns >= torch.tensor(starts)[:, None]) & attention_mask.bool()


def _row_mask(rows: Sequence[Row]) -> torch.Tensor:
    return torch.tensor([not row.get("filler", False) for row in rows])


def collate_sft(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows of purpose "sft" or "pretrain", padded on the right.

    Returns input_ids, attention_mask and target_mask, all (B, T): true where the token is to be predicted, that is on
    response tokens with their EOS, from `response_start` on, or within `target_spans` where a row has several. Column 0
    has no predecessor and is never a target; a filler row has no targets.
    """
    ids, attention_mask = pad([row["input_ids"] for row in rows], pad_id)
    targets = _span_mask([max(row["response_start"], 1) for row in rows], attention_mask)
    for mask, row in zip(targets, rows, strict=True):
        if spans := row.get("target_spans"):
            mask[:] = False
            for start, end in zip(spans[::2], spans[1::2], strict=True):
                mask[max(start, 1) : end] = True
    return {"input_ids": ids, "attention_mask": attention_mask, "target_mask": targets & _row_mask(rows)[:, None]}


def collate_preference(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows of purpose "preference" as one batch of 2B sequences padded on the right: B chosen, then their B rejected.

    Returns input_ids, attention_mask and response_mask (2B, T), the last true on response tokens with their EOS;
    prompt_lengths (B,), the tokens with which both sequences of a pair begin; row_mask (B,): false for filler pairs,
    which have sequences like any other and must not enter losses or metrics; and numbers of the pairs: margin (B,)
    fp32, 0 where the rows have none, source (B,) int64, their data sets, and weight (B,) fp32, theirs in the loss: 1
    where the rows have none, and 0 for filler pairs. Rows with "reference_logprobs"
    (`utils.preference.reference`) give these, (B, 2, 2) fp32.
    """
    return _two_answers(rows, ("chosen_ids", "rejected_ids"), pad_id)


def collate_labelled(rows: Sequence[Row], pad_id: int) -> Batch:
    """Rows of purpose "labelled" with a mate (`utils.preference.mates`): B answers, then the B mates, to other prompts.

    Returns what `collate_preference` does, and labels (B,): true for a desirable answer.
    """
    batch = _two_answers(rows, ("response_ids", "mate_ids"), pad_id)
    return batch | {"labels": torch.tensor([row["label"] for row in rows])}


def _two_answers(rows: Sequence[Row], responses: tuple[str, str], pad_id: int) -> Batch:
    ids, attention_mask = pad([row["prompt_ids"] + row[name] for name in responses for row in rows], pad_id)
    starts = [len(row["prompt_ids"]) for row in rows]
    batch = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "response_mask": _span_mask(starts * 2, attention_mask),
        "prompt_lengths": torch.tensor(starts),
        "row_mask": _row_mask(rows),
        "margin": torch.tensor([row.get("margin") or 0.0 for row in rows], dtype=torch.float32),
        "source": torch.tensor([row.get("source") or 0 for row in rows]),
        "weight": torch.tensor([0.0 if row.get("filler") else row.get("weight", 1.0) for row in rows]),
    }
    if "reference_logprobs" in rows[0]:
        known = [row["reference_logprobs"] for row in rows]
        batch["reference_logprobs"] = torch.tensor(known, dtype=torch.float32)
    return batch
