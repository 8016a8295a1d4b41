"""Prompts with their responses, in the micro-batches in which they are scored and trained.

    B sequences, P prompt columns (left-padded), R response columns (right-padded)

    column      0 . . P-1 | P  P+1 ... P+R-1
    sequence    .  p  p  p | r0 r1  r2(eos) .
    response                 j=0 j=1 j=2     j=3
    mask                     1   1   1       0

Column j of a response describes the token `sequences[:, P + j]`, which is predicted at position P + j - 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.algorithms.masking import last_index
from utils.arguments.steps import StepConfig
from utils.data.batches.collate import pad
from utils.data.batches.packing import token_batches
from utils.generation.responses import Responses


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The sequences of one forward pass."""

    rows: tuple[int, ...]  # their indices in the rollout of this rank
    sequences: torch.Tensor  # (B, P+R) token ids
    attention_mask: torch.Tensor  # (B, P+R) bool
    response_mask: torch.Tensor  # (B, R) bool, true on the tokens of the response, including its EOS or stop string

    @property
    def prompt_columns(self) -> int:
        """P."""
        return self.sequences.size(1) - self.response_mask.size(1)

    @property
    def target_mask(self) -> torch.Tensor:
        """(B, P+R) bool, true on the response tokens."""
        return F.pad(self.response_mask, (self.prompt_columns, 0), value=False)

    @property
    def last_columns(self) -> torch.Tensor:
        """(B,) the column of `sequences` that holds each response's last token."""
        return self.prompt_columns + last_index(self.response_mask)


def plan_batches(
    prompts: Sequence[list[int]], responses: Responses, config: StepConfig, *, pad_id: int
) -> list[list[MicroBatch]]:
    """The micro-batches of each optimiser step on a rollout of this rank.

    A step has per_device_training_batch_size x gradient_accumulation_steps rows. `--max_tokens_per_batch` regroups
    them by length. Every rank must call it with the same number of prompts.
    """
    lengths = [len(prompt) + count for prompt, count in zip(prompts, responses.lengths.tolist(), strict=True)]
    steps = group_rows(lengths, config)
    return [[assemble(prompts, responses, part, pad_id) for part in step] for step in steps]


def group_rows(lengths: Sequence[int], config: StepConfig) -> list[list[list[int]]]:
    """The rows of each micro-batch of each optimiser step, for rows of these lengths in their order."""
    size, steps = config.micro_batch_rows, []
    for start in range(0, len(lengths), config.step_rows):
        rows = list(range(start, min(start + config.step_rows, len(lengths))))
        if config.max_tokens_per_batch:
            parts = token_batches([lengths[row] for row in rows], config.max_tokens_per_batch)
            steps.append([[rows[index] for index in part] for part in parts])
        else:
            steps.append([rows[first : first + size] for first in range(0, len(rows), size)])
    return steps


def assemble(prompts: Sequence[list[int]], responses: Responses, rows: list[int], pad_id: int) -> MicroBatch:
    """The prompts and responses of `rows`; P and R are the longest among them."""
    prompt_ids, prompt_mask = (
        tensor.to(responses.tokens.device) for tensor in pad([prompts[row] for row in rows], pad_id, left=True)
    )
    mask = responses.mask[rows]
    width = int(mask.sum(1).max())
    mask = mask[:, :width]
    return MicroBatch(
        rows=tuple(rows),
        sequences=torch.cat([prompt_ids, responses.tokens[rows, :width]], 1),
        attention_mask=torch.cat([prompt_mask.bool(), mask], 1),
        response_mask=mask,
    )
