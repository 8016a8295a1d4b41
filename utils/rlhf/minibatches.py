"""The minibatches of PPO's epochs over a rollout.

In the first epoch they are those that were scored, so that every ratio is 1 to the last bit before the first update.
In later epochs the rows are shuffled into new ones, so that gradients do not depend on one grouping of the rows.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from utils.arguments.steps import PpoConfig
from utils.generation.micro_batches import group_rows
from utils.parallel.distributed import derived_seed
from utils.rlhf.experience import Experience, Rollout

Minibatch = Sequence[Experience]  # the micro-batches of one optimiser step


def minibatches(rollout: Rollout, config: PpoConfig, *, seed: int) -> Iterator[Minibatch]:
    """Those of `--ppo_epochs` passes over the rollout, each pass in a different order. All ranks must take part."""
    rows = [row for step in rollout for batch in step for row in batch.rows]
    for epoch in range(config.ppo_epochs):
        order = random.Random(derived_seed(seed, epoch))
        steps = rollout
        if epoch and len(rollout) > 1:
            steps = regrouped(rollout, order.sample(rows, len(rows)), config)
        yield from order.sample(steps, len(steps))


def regrouped(rollout: Rollout, order: Sequence[int], config: PpoConfig) -> Rollout:
    """The same rows in the order of `order`, in optimiser steps and micro-batches as the flags make them."""
    table = _stacked([batch for step in rollout for batch in step])
    place = {row: index for index, row in enumerate(table.rows)}
    lengths = table.attention_mask.sum(1).tolist()
    steps = group_rows([lengths[place[row]] for row in order], config)
    return [[_rows_of(table, [place[order[index]] for index in part]) for part in step] for step in steps]


def _stacked(batches: Sequence[Experience]) -> Experience:
    """All rows as one batch; P and R are the largest."""
    prompt = max(batch.prompt_columns for batch in batches)
    response = max(batch.response_mask.size(1) for batch in batches)

    def widened(name: str) -> torch.Tensor:
        parts = []
        for batch in batches:
            tensor, columns = getattr(batch, name), batch.response_mask.size(1)
            if tensor.ndim == 2:
                left = prompt - batch.prompt_columns if tensor.size(1) > columns else 0
                tensor = F.pad(tensor, (left, response - columns))
            parts.append(tensor)
        return torch.cat(parts)

    tensors = {name: widened(name) for name in _tensor_names(batches[0])}
    return dataclasses.replace(batches[0], rows=tuple(row for batch in batches for row in batch.rows), **tensors)


def _rows_of(table: Experience, places: list[int]) -> Experience:
    """Some rows of the table, without the columns that none of them needs."""
    columns, response = table.prompt_columns, int(table.response_mask[places].sum(1).max())
    prompt = int(table.attention_mask[places, :columns].sum(1).max())

    def part(name: str) -> torch.Tensor:
        tensor = getattr(table, name)[places]
        if tensor.ndim == 1:
            return tensor
        is_whole = tensor.size(1) > table.response_mask.size(1)
        return tensor[:, columns - prompt : columns + response] if is_whole else tensor[:, :response]

    tensors = {name: part(name) for name in _tensor_names(table)}
    return dataclasses.replace(table, rows=tuple(table.rows[place] for place in places), **tensors)


def _tensor_names(batch: Experience) -> list[str]:
    return [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
