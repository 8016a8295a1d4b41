"""From scores and log-probabilities to advantages, over the whole rollout."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.algorithms.advantages import RewardedTokens, masked_moments, moments_to_mean_var, whiten
from utils.algorithms.kl import kl_penalty, per_token_rewards
from utils.arguments.choices import ADVANTAGE_ESTIMATORS
from utils.arguments.ppo import PpoArguments
from utils.parallel import distributed
from utils.rewards.shaping import Scores
from utils.rlhf.experience import Experience, Rollout, Samples


@torch.no_grad()
def estimate_advantages(
    samples: list[list[Samples]], scores: Scores, groups: Tensor, config: PpoArguments, *, kl_ctl: float
) -> Rollout:
    """The experience of a rollout: rewards per token, advantages by `--advantage_estimator`, both whitened if set.

    Args:
        samples: the micro-batches of each optimiser step, of N rows in all. scores: of these rows, (N,).
        groups: (N,) int64, equal for answers to the same prompt.
        kl_ctl: KL coefficient, the penalty per nat of KL to the reference.
    """
    micro_batches = [batch for step in samples for batch in step]
    rewards = [_token_rewards(batch, scores.shaped, config, kl_ctl) for batch in micro_batches]
    if config.whiten_rewards:
        masks = [batch.response_mask for batch in micro_batches]
        rewards = _whitened(rewards, masks, shift_mean=False)
    estimate = ADVANTAGE_ESTIMATORS[config.advantage_estimator].load()
    rollout = _whole_rollout(micro_batches, rewards, scores.shaped, groups)
    advantages, returns = (_per_batch(tensor, micro_batches) for tensor in estimate(rollout, config))
    if config.whiten_advantages:
        advantages = _whitened(advantages, [batch.response_mask for batch in micro_batches])
    experiences = iter(
        Experience(
            **vars(batch), scores=scores.raw[list(batch.rows)], rewards=reward, advantages=advantage, returns=return_
        )
        for batch, reward, advantage, return_ in zip(micro_batches, rewards, advantages, returns, strict=True)
    )
    return [[next(experiences) for _ in step] for step in samples]


def group_numbers(rows: Sequence[dict[str, Any]]) -> Tensor:
    """(N,) int64, equal for rows with the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(row["prompt_ids"]), len(numbers)) for row in rows])


def _token_rewards(batch: Samples, shaped: Tensor, config: PpoArguments, kl_ctl: float) -> Tensor:
    kl = kl_penalty(batch.logprobs, batch.ref_logprobs, config.kl_estimator, config.kl_clamp)
    return per_token_rewards(shaped[list(batch.rows)], kl, batch.response_mask, kl_ctl)


def _whole_rollout(batches: list[Samples], rewards: list[Tensor], shaped: Tensor, groups: Tensor) -> RewardedTokens:
    """The micro-batches as one table of N rows, in the order of the rollout."""
    values = None if batches[0].values is None else _table(batches, [batch.values for batch in batches])
    return RewardedTokens(
        rewards=_table(batches, rewards),
        values=values,
        mask=_table(batches, [batch.response_mask for batch in batches]),
        scores=shaped,
        groups=groups.to(shaped.device),
    )


def _table(batches: list[Samples], parts: list[Tensor]) -> Tensor:
    """(N, R) from parts of (B, R') each, R the largest R'; zero where a part has no column."""
    count, width = sum(len(batch.rows) for batch in batches), max(part.size(1) for part in parts)
    table = parts[0].new_zeros(count, width)
    for batch, part in zip(batches, parts, strict=True):
        table[list(batch.rows), : part.size(1)] = part
    return table


def _per_batch(table: Tensor, batches: list[Samples]) -> list[Tensor]:
    """The inverse of `_table`."""
    return [table[list(batch.rows), : batch.response_mask.size(1)] for batch in batches]


def _whitened(tensors: list[Tensor], masks: list[Tensor], *, shift_mean: bool = True) -> list[Tensor]:
    """`whiten` by the mean and variance over all tensors of all ranks."""
    moments = sum(masked_moments(tensor, mask).cpu() for tensor, mask in zip(tensors, masks, strict=True))
    mean, var = moments_to_mean_var(distributed.all_reduce(moments))
    return [whiten(tensor, mask, mean, var, shift_mean=shift_mean) for tensor, mask in zip(tensors, masks, strict=True)]
