"""The interface of a source of scores: what it gets, and what it returns."""

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
    """B answers of this process, as ids and as text, with the other columns of their data rows.

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
        """The right answer of each row: its `reference` column, else the chosen response of its data; or None."""
        return [row["reference"] for row in self.rows]

    @cached_property
    def columns(self) -> list[dict[str, Any]]:
        """The other columns of each row."""
        return [json.loads(row["columns"]) for row in self.rows]


class RewardSource(Protocol):
    """Something that scores answers: a row of `REWARD_SOURCES` names the class.

    The class is called with `(config, tokenizer)`, on every process, before the run begins.

    Attributes:
        score_mean, score_std: of its scores of good answers, to normalise scores with; 0 and 1 for no normalisation.
        module: the model whose weights it reads, None without one.
        is_collective: all processes must call it together, because it communicates between them. Otherwise
            each scores its own answers, and an exception on one is reported on all.
    """

    score_mean: float
    score_std: float
    module: nn.Module | None
    is_collective: bool

    def __call__(self, answers: Answers) -> torch.Tensor:
        """(B,) fp32 scores, one for each answer; higher is better."""
        ...
