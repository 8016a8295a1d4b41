"""What a rollout hands to PPO.

    B sequences, P prompt columns (left-padded), R response columns (right-padded)

    column      0 . . P-1 | P  P+1 ... P+R-1
    sequence    .  p  p  p | r0 r1  r2(eos) .
    response                 j=0 j=1 j=2     j=3
    mask                     1   1   1       0

Column j describes the token `sequences[:, P + j]`, which is predicted at position P + j - 1. Only `response_logprobs`
and `response_values` know of that shift.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One micro-batch of rollouts, complete. All per-token fields are zero outside `response_mask`."""

    sequences: torch.Tensor  # (B, P+R) token ids
    attention_mask: torch.Tensor  # (B, P+R) bool
    response_mask: torch.Tensor  # (B, R) bool, true on the tokens of the response, its end (EOS, stop string) inclusive
    logprobs: torch.Tensor  # (B, R) fp32, of the policy at rollout time
    ref_logprobs: torch.Tensor  # (B, R) fp32
    values: torch.Tensor  # (B, R) fp32, at rollout time
    scores: torch.Tensor  # (B,) raw output of the reward model
    rewards: torch.Tensor  # (B, R) -kl_ctl * KL, the score added at the last response token
    advantages: torch.Tensor  # (B, R), whitened over the rollout of all ranks
    returns: torch.Tensor  # (B, R)


def target_mask(sequences: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(B, P+R) bool, true on the response tokens, from the (B, R) response mask."""
    prompt_columns = sequences.size(1) - response_mask.size(1)
    return nn.functional.pad(response_mask, (prompt_columns, 0), value=False)


def response_logprobs(
    policy: nn.Module, sequences: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor, *,
    temperature: float = 1.0, with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Log-probabilities (and entropies) of the response tokens under `policy`, (B, R) fp32, zero outside the mask.

    Args:
        policy: a `CausalLM` or the engine around it.
        sequences, attention_mask: (B, P+R); response_mask: (B, R).
        temperature: that of the sampling, so that both sides of PPO's ratio speak of the same distribution.
    """
    flat_logprobs, flat_entropy = policy(
        sequences,
        attention_mask,
        target_mask(sequences, response_mask),
        temperature=temperature,
        with_entropy=with_entropy,
    )
    blank = torch.zeros(response_mask.shape, dtype=torch.float32, device=sequences.device)
    logprobs = blank.masked_scatter(response_mask, flat_logprobs)
    return logprobs, blank.masked_scatter(response_mask, flat_entropy) if with_entropy else None


def response_values(
    critic: nn.Module, sequences: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """The critic's values of the states in which response tokens were chosen, (B, R) fp32, zero off the mask."""
    values = critic(sequences, attention_mask)
    first = sequences.size(1) - response_mask.size(1)
    return values[:, first - 1 : -1].masked_fill(~response_mask, 0.0)
