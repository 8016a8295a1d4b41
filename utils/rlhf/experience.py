"""The stages of a rollout: micro-batches, then with log-probabilities and values, then with advantages.

All per-token fields are (B, R), column j for the j-th token of the response, and zero outside `response_mask`. Only
`response_logprobs` and `response_values` deal with the fact that a token is predicted one position earlier.
"""

from dataclasses import dataclass

import torch
from torch import nn

from utils.generation.micro_batches import MicroBatch


@dataclass(frozen=True, kw_only=True)
class Samples(MicroBatch):
    """A micro-batch as actor, reference and critic saw it at rollout time."""

    logprobs: torch.Tensor  # (B, R) fp32, of the policy
    ref_logprobs: torch.Tensor  # (B, R) fp32
    values: torch.Tensor | None  # (B, R) fp32; None without a critic


@dataclass(frozen=True, kw_only=True)
class Experience(Samples):
    """A micro-batch with the rewards, advantages and returns to learn from."""

    scores: torch.Tensor  # (B,) raw, as the reward's source gives them
    rewards: torch.Tensor  # (B, R) -kl_ctl * KL, the shaped score added at the last response token
    advantages: torch.Tensor  # (B, R), whitened over the rollout of all ranks
    returns: torch.Tensor  # (B, R)


Rollout = list[list[Experience]]  # the micro-batches of each optimiser step, on this rank


def response_logprobs(
    policy: nn.Module, batch: MicroBatch, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities (and entropies) of the response tokens under `policy`, (B, R) fp32, zero outside the mask.

    Args:
        policy: a `CausalLM` or the engine around it.
        temperature: that of the sampling, so that both sides of PPO's ratio are of the same distribution.
    """
    flat_logprobs, flat_entropy = policy(
        batch.sequences,
        batch.attention_mask,
        batch.target_mask,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    mask = batch.response_mask
    blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    logprobs = blank.masked_scatter(mask, flat_logprobs)
    return logprobs, blank.masked_scatter(mask, flat_entropy) if with_entropy else None


def response_values(critic: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The critic's values of the states in which response tokens were chosen, (B, R) fp32, zero off the mask."""
    values = critic(batch.sequences, batch.attention_mask)
    return values[:, batch.prompt_columns - 1 : -1].masked_fill(~batch.response_mask, 0.0)
