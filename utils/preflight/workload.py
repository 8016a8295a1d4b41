"""The heaviest micro-batch of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.data.batches.sizes import ROW_KINDS, SEQUENCES, Rows, RowSize
from utils.runs.plan import Plan


@dataclass(frozen=True)
class BatchShape:
    """The heaviest micro-batch of a process, and how many like it make an optimiser step."""

    tokens: int
    sequences: int
    width: int
    targets: int
    per_step: int

    @property
    def fill(self) -> float:
        """Share of `sequences` x `width` that holds tokens."""
        return self.tokens / (self.sequences * self.width)


def training_batch(plan: Plan, rows: Rows, *, max_tokens: int) -> BatchShape:
    """The heaviest micro-batch that the flags and the data allow; of `max_tokens` tokens, if that is above 0."""
    config, fallback = plan.config, longest_row(plan)
    if plan.trains_on_texts:  # of full length, every token of which is a target
        rows, fallback = Rows(None), SEQUENCES.longest(config.longest_sequence()[0], 0)
    return micro_batch(
        rows.heaviest,
        fallback,
        rows=config.micro_batch_rows,
        steps=config.gradient_accumulation_steps,
        max_tokens=max_tokens,
    )


def evaluation_batch(plan: Plan, rows: Rows) -> BatchShape:
    """The heaviest batch of held-out rows, which are taken to be like those that train."""
    return micro_batch(rows.heaviest, longest_row(plan), rows=plan.evaluation_rows, steps=1, max_tokens=0)


def longest_row(plan: Plan) -> RowSize:
    """The heaviest row that the flags allow."""
    config = plan.config
    return ROW_KINDS[config.purpose].longest(config.longest_sequence()[0], config.answer_limit)


def micro_batch(
    heaviest: Sequence[RowSize], fallback: RowSize, *, rows: int, steps: int, max_tokens: int
) -> BatchShape:
    """The heaviest micro-batch that can occur.

    Args:
        heaviest: the heaviest rows known, heaviest first; `fallback` stands in where they are too few.
        rows: of a micro-batch. steps: micro-batches of an optimiser step.
        max_tokens: `--max_tokens_per_batch`: rows of the whole step are regrouped into micro-batches of that many.
    """
    known = list(heaviest) or [fallback]
    size = rows * steps if max_tokens else rows
    group = [known[index % len(known)] for index in range(size)]
    tokens, targets = sum(row.tokens for row in group), sum(row.targets for row in group)
    width = max(row.width for row in group)
    if max_tokens:
        steps = max(1, math.ceil(tokens / max_tokens))
        if tokens > max_tokens:
            tokens, targets = max_tokens, math.ceil(targets * max_tokens / tokens)
    return BatchShape(tokens, max(1, math.ceil(tokens / width)), width, targets, steps)
