"""Unpaired rows with a mate each: the answer to another prompt, with which KTO estimates the KL to the reference.

KTO's authors match the prompts of a batch with each other's answers. Here a row's mate is the answer of a training row
with another prompt: the next one from the row's own number on, in the random order that training rows have. So the
estimate is over as many mismatched pairs, does not depend on how rows are spread over micro-batches and processes, and
the reference's log-probabilities of the mismatched pairs can be computed beforehand.
"""

from typing import Any

from torch.utils.data import Dataset

from utils.data.rows.dataset import TokenDataset
from utils.errors import InputError


class MatedRows(Dataset):
    """Rows of purpose "labelled", with "mate_ids" in addition.

    Args:
        mates: the training rows. max_len: tokens of a row's sequence, at most; a mate is cut to fit.
    """

    def __init__(self, rows: TokenDataset, mates: TokenDataset, max_len: int) -> None:
        self._rows, self._mates, self._max_len = rows, mates.of_all_epochs(), max_len
        self.key = f"{rows.key}-mates"
        self.groups = rows.groups

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        mate = self._mate(self.number(index), row["prompt_ids"])
        return row | {"mate_ids": mate[: self._max_len - len(row["prompt_ids"])]}

    def _mate(self, index: int, prompt: list[int]) -> list[int]:
        for other in range(index + 1, index + 1 + len(self._mates)):
            row = self._mates[other % len(self._mates)]
            if row["prompt_ids"] != prompt:
                return row["response_ids"]
        raise InputError("--loss kto compares answers to different prompts, and all rows have the same: give more data")

    def number(self, index: int) -> int:
        """See `TokenDataset`."""
        return self._rows.number(index)

    def set_epoch(self, epoch: int) -> None:
        """See `TokenDataset`."""
        self._rows.set_epoch(epoch)

    def of_all_epochs(self) -> "MatedRows":
        """See `TokenDataset`."""
        return MatedRows(self._rows.of_all_epochs(), self._mates, self._max_len)

    def lengths(self, column: str) -> list[int]:
        """Tokens of each row's `column`, of those that `TokenDataset` has."""
        return self._rows.lengths(column)


def check_labels(rows: TokenDataset, what: str) -> None:
    """Refuse rows of one kind only, from which nothing can be learnt by comparison.

    Raises:
        InputError: naming the kind that is missing.
    """
    desirable = sum(rows.column("label"))
    if desirable in (0, len(rows)):
        kind, missing = ("undesirable", "true") if desirable == 0 else ("desirable", "false")
        raise InputError(
            f"--loss kto needs desirable and undesirable answers, and all {len(rows)} {what} rows are {kind}: add rows "
            f"whose `label` is {missing}, or use step 1 for good answers alone"
        )
