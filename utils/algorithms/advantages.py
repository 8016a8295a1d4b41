"""Generalised advantage estimation, and whitening over a rollout that is spread over ranks.

Means and variances travel as moments, `[count, sum, sum of squares]`: those of two micro-batches or of two ranks simply
add, and all ranks then normalise with the same numbers. Normalising per sequence instead would erase the difference
between good and bad answers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RewardedTokens:
    """A whole rollout of this rank, N responses of up to R tokens: the input of an advantage estimator.

    An estimator is a function of this and of the flags, and a row of `ADVANTAGE_ESTIMATORS` in
    `utils.arguments.choices`. It returns advantages and returns, both (N, R) fp32 and zero outside the mask.
    """

    rewards: Tensor  # (N, R) per token: the KL penalty, plus the score at the last token
    values: Tensor | None  # (N, R) of the state in which the token was chosen; None without a critic
    mask: Tensor  # (N, R) bool, true on the tokens of the response
    scores: Tensor  # (N,) of the whole response, shaped, without the KL penalty
    groups: Tensor  # (N,) int64, equal for responses to the same prompt


class Discounts(Protocol):
    """The flags that `generalized_advantages` reads."""

    gamma: float
    lam: float


def generalized_advantages(rollout: RewardedTokens, flags: Discounts) -> tuple[Tensor, Tensor]:
    """`gae` of the rollout."""
    return gae(rollout.rewards, rollout.values, rollout.mask, flags.gamma, flags.lam)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each response token (Schulman et al. 2016, eq. 16).

        delta_t     = r_t + gamma * V_{t+1} - V_t         with V = 0 after the last response token
        advantage_t = sum_k (gamma * lam)^k * delta_{t+k}
        return_t    = advantage_t + V_t

    Args:
        rewards: (B, R) reward per token.
        values: (B, R) value of the state in which the token was chosen.
        mask: (B, R) response mask: true in the first columns of each row, false after its last token.
        gamma, lam: discount and trace decay, between 0 and 1.
    Returns:
        advantages and returns, both (B, R) fp32, zero outside the mask, without gradient.
    """
    mask = mask.bool()
    rewards = torch.where(mask, rewards.float(), 0)
    values = torch.where(mask, values.float(), 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for column in reversed(range(values.size(1))):
        delta = rewards[:, column] + gamma * next_value - values[:, column]
        advantages[:, column] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[:, column], advantages[:, column]
    return advantages, advantages + values


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of `x` where `mask` is true: (3,) float64, to be added over batches and ranks.

    float64, because a variance from sums loses its digits to cancellation when the mean is large.
    """
    mask = mask.bool()
    wide = torch.where(mask, x.double(), 0)
    return torch.stack([mask.sum().double(), wide.sum(), wide.square().sum()])


def moments_to_mean_var(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(3,) summed moments -> mean and population variance, float64 scalars; both 0 when nothing was counted."""
    count, total, total_squares = moments.double().unbind()
    count = count.clamp(min=1)
    mean = total / count
    return mean, (total_squares / count - mean.square()).clamp(min=0)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, mean: Tensor | float, var: Tensor | float, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) where `mask` is true and 0 elsewhere, (B, R) fp32.

    `mean` and `var` come from `moments_to_mean_var` of the whole rollout, over all ranks. With `shift_mean` false the
    mean is put back afterwards: rewards are scaled but keep their sign on average (Ziegler et al. 2019).
    """
    mean, var = (torch.as_tensor(m, dtype=torch.float64, device=x.device) for m in (mean, var))
    whitened = (x.double() - mean) * torch.rsqrt(var + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask.bool(), whitened, 0).float()


def explained_variance(returns_moments: Tensor, residual_moments: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one, negative if worse.

    Args:
        returns_moments: (3,) `masked_moments(returns, mask)`, summed over batches and ranks.
        residual_moments: (3,) `masked_moments(returns - values, mask)`, summed likewise.
    Returns:
        float64 scalar; 0 when the returns do not vary and the quotient is meaningless.
    """
    _, returns_var = moments_to_mean_var(returns_moments)
    _, residual_var = moments_to_mean_var(residual_moments)
    explained = 1 - residual_var / returns_var.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(returns_var > 0, explained, 0.0)
