"""Losses of PPO's actor and critic.

Token losses return `sum over the mask / denominator`, where `denominator` is the number of tokens of the whole
optimiser step: every micro-batch, on every rank. The micro-batch losses of a step then add up to the token mean over
the global batch, however uneven the parts are. An engine that averages gradients over ranks or accumulation steps
divides once more, which the caller undoes by scaling the denominator.

Their statistics are detached scalar sums that add over micro-batches and ranks, to be divided by `tokens` in the end;
`ratio_max` is the one exception, and is combined with a maximum.
"""

import torch
from torch import Tensor

from utils.algorithms.masking import masked_sum

# exp(20) = 4.9e8: beyond this the policy is far from the old one in any case, and an infinite ratio would turn the zero
# gradient of a clipped token into 0 * inf = nan.
MAX_LOG_RATIO = 20.0
MAX_SHOWN_LOG_RATIO = 70.0  # in statistics: sums of exp(70) are finite in fp32


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    denominator: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss (Schulman et al. 2017, eq. 7, negated), summed over the mask, over `denominator`.

    Args:
        logprobs, old_logprobs: (B, R) log-probabilities of the response tokens now and at rollout time.
        advantages: (B, R).
        mask: (B, R) response mask.
        cliprange: the ratio is clipped to between 1 - cliprange and 1 + cliprange.
        denominator: tokens of the whole optimiser step.
    Returns:
        The loss and the sums `tokens`, `policy_loss`, `approx_kl_k1`, `approx_kl_k3` (estimates of KL(old || new)),
        `clip_count` (tokens whose gradient the clip removed), `ratio_sum`, and the maximum `ratio_max`. They use the
        true ratio, also where the loss bounds it.
    """
    mask = mask.bool()
    true_log_ratio = torch.where(mask, logprobs.float() - old_logprobs.float(), 0)
    ratio = true_log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = torch.where(mask, advantages.float(), 0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    total = masked_sum(torch.maximum(unclipped, clipped), mask)

    with torch.no_grad():
        true_ratio = true_log_ratio.clamp(max=MAX_SHOWN_LOG_RATIO).exp()
        stats = {
            "tokens": mask.sum().float(),
            "policy_loss": total.detach(),
            "approx_kl_k1": (-true_log_ratio).sum(),
            "approx_kl_k3": (true_log_ratio.clamp(max=MAX_SHOWN_LOG_RATIO).expm1() - true_log_ratio).sum(),
            "clip_count": (clipped > unclipped).sum().float(),
            "ratio_sum": masked_sum(true_ratio, mask),
            "ratio_max": torch.where(mask, true_ratio, 0).max(),
        }
    return total / denominator, stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float,
    denominator: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss 0.5 * max((v - R)^2, (clip(v) - R)^2), summed over the mask, over `denominator`.

    `clip` keeps a value within `cliprange_value` of its rollout value (Schulman et al.'s ppo2; "The 37 implementation
    details of PPO", detail 9).

    Args:
        values, old_values: (B, R) values now and at rollout time.
        returns: (B, R).
        mask: (B, R) response mask.
        cliprange_value: in units of the reward.
        denominator: tokens of the whole optimiser step.
    Returns:
        The loss and the sums `tokens`, `value_loss`, `value_clip_count` (tokens whose gradient the clip removed).
    """
    mask = mask.bool()
    values, old_values, returns = (torch.where(mask, x.float(), 0) for x in (values, old_values, returns))
    unclipped = 0.5 * (values - returns).square()
    within = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    clipped = 0.5 * (within - returns).square()
    total = masked_sum(torch.maximum(unclipped, clipped), mask)

    with torch.no_grad():
        stats = {
            "tokens": mask.sum().float(),
            "value_loss": total.detach(),
            "value_clip_count": (clipped > unclipped).sum().float(),
        }
    return total / denominator, stats


def entropy_loss(
    entropy: Tensor, mask: Tensor, entropy_coef: float, denominator: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The entropy bonus as a term to *add* to the policy loss: -entropy_coef * sum(entropy) / denominator.

    Minimising it raises the entropy (Mnih et al. 2016; the sign is where implementations slip).

    Args:
        entropy: (B, R) entropy in nats of the distribution each response token was drawn from.
        mask: (B, R) response mask.
        entropy_coef: weight of the bonus, >= 0.
        denominator: tokens of the whole optimiser step.
    Returns:
        The loss and the sum `entropy`, positive, without the coefficient.
    """
    total = masked_sum(entropy, mask)
    return -entropy_coef * total / denominator, {"entropy": total.detach()}
