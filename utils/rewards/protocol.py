"""What a source of scores gets, and what it gives."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.generation.responses import Responses

Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """B answers of this process, as ids and as text, with what their rows of data say besides.

    Attributes:
        rows: as the data loader gives them (`build_datasets`, purpose "prompts").
        responses: the ids, see `Responses`.
    """

    rows: Sequence[Row]
    responses: Responses
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of each prompt."""
        return [row["prompt_ids"] for row in self.rows]

    @property
    def prompts(self) -> list[str]:
        """The text of each prompt, as its row has it."""
        return [row["prompt"] for row in self.rows]

    @cached_property
    def texts(self) -> list[str]:
        """The text of each answer, without special tokens."""
        return self.responses.texts(self.tokenizer)

    @property
    def references(self) -> list[str | None]:
        """The right answer of each row: its `reference` column, else the wanted response of its data; None without."""
        return [row["reference"] for row in self.rows]

    @cached_property
    def columns(self) -> list[dict[str, Any]]:
        """The other columns of each row."""
        return [json.loads(row["columns"]) for row in self.rows]


class RewardSource(Protocol):
    """Something that scores answers: a row of `REWARD_SOURCES` names the class.

    A class is made from `(config, tokenizer)`, on every process, before the run begins.

    Attributes:
        score_mean, score_std: of its scores of good answers, with which they are normalised; 0 and 1 for none.
        module: the model whose weights it reads, None without one.
        is_collective: all processes must call it together, because they exchange something while it works. Otherwise
            each scores its own answers, and an exception on one is reported on all.
    """

    score_mean: float
    score_std: float
    module: nn.Module | None
    is_collective: bool

    def __call__(self, answers: Answers) -> torch.Tensor:
        """(B,) fp32 scores, one for each answer; higher is better."""
        ...
