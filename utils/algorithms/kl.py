"""The reward PPO maximises: the score of the whole response at its last token, minus a KL penalty on every token."""

import math

import torch
from torch import Tensor

from utils.algorithms.masking import last_index

MAX_EXPONENT = 80.0  # exp of it is finite in fp32: an infinite one would have a gradient of 0 * inf under the clamp


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clamp: float) -> Tensor:
    """Per-token estimate of KL(policy || reference) for tokens sampled from the policy (Schulman 2020, "Approximating
    KL divergence"). With d = logprobs - ref_logprobs:

        k1 = d                    unbiased; negative for some tokens
        k2 = d^2 / 2              biased, low variance, never negative
        k3 = exp(-d) - 1 + d      unbiased, low variance, never negative

    Args:
        logprobs, ref_logprobs: (B, R) log-probabilities of the sampled tokens.
        estimator: "k1", "k2" or "k3".
        clamp: estimates are kept within +-clamp, so that a single token cannot outweigh the score.
    Returns:
        (B, R) fp32; outside the response mask its values depend on the inputs there. The gradient is finite everywhere.
    Raises:
        ValueError: unknown estimator.
    """
    difference = logprobs.float() - ref_logprobs.float()
    match estimator:
        case "k1":
            kl = difference
        case "k2":
            kl = 0.5 * difference.square()
        case "k3":
            kl = torch.expm1((-difference).clamp(max=MAX_EXPONENT)) + difference
        case _:
            raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")
    return kl.clamp(-clamp, clamp)


def per_token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_ctl: float) -> Tensor:
    """-kl_ctl * kl on every response token, and the score added at the last one (Ouyang et al. 2022, section 3.5).

    Args:
        scores: (B,) score per sequence, already normalised and clipped.
        kl: (B, R) from `kl_penalty`.
        mask: (B, R) response mask; a row without any true entry gets no reward at all.
        kl_ctl: KL coefficient.
    Returns:
        (B, R) fp32, zero outside the mask.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -kl_ctl * kl.float(), 0)
    columns = torch.arange(mask.size(1), device=mask.device)
    is_last = columns == last_index(mask).unsqueeze(1)
    return rewards + torch.where(is_last, scores.float().unsqueeze(1), 0)


def adaptive_kl_ctl(kl_ctl: float, observed_kl: float, target: float, horizon: float, num_samples: int) -> float:
    """The next KL coefficient: raised when the policy strays further than `target`, lowered when less (Ziegler et al.
    2019, section 2.2):

        error   = clip(observed_kl / target - 1, -0.2, 0.2)
        kl_ctl' = kl_ctl * (1 + error * num_samples / horizon)

    Args:
        observed_kl: mean over sequences of the KL summed over their tokens, in nats, unclamped. `target` likewise.
        horizon: samples over which the coefficient can change by about 20 %.
        num_samples: sequences in this rollout, over all ranks. More than `horizon` count as `horizon`, since the
            coefficient would turn negative at more than five times that.
    Raises:
        ValueError: `observed_kl` is not finite.
    """
    if not math.isfinite(observed_kl):
        raise ValueError(f"the observed KL is {observed_kl}")
    error = min(max(observed_kl / target - 1, -0.2), 0.2)
    return kl_ctl * (1 + error * min(num_samples / horizon, 1.0))


def normalize_scores(scores: Tensor, mean: float, std: float, clip: float) -> Tensor:
    """(scores - mean) / std within +-clip, (B,) fp32. `mean` and `std` are step 2's; 0 and 1 only clip."""
    return ((scores.float() - mean) / max(std, 1e-8)).clamp(-clip, clip)
