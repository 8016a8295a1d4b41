"""The algorithms together, on a policy small enough to check: a table of logits, no model, no engine.

Responses of up to four tokens over six words, one of which ends them. The score is the number of `GOOD` words minus one
for a response that never ends. A sign or a shift wrong anywhere in the chain, and this does not learn.
"""

import pytest
import torch

from utils.algorithms.advantages import gae, masked_moments, moments_to_mean_var, whiten
from utils.algorithms.kl import kl_penalty, per_token_rewards
from utils.algorithms.masking import masked_sum, response_mask
from utils.algorithms.policy_losses import policy_loss, value_loss

WORDS, WIDTH, EOS, GOOD = 6, 4, 0, 3
BATCH, EPOCHS, ITERATIONS = 64, 4, 60


def logprobs_of(logits, tokens):
    return logits.log_softmax(-1).expand(len(tokens), -1, -1).gather(2, tokens[:, :, None]).squeeze(2)


def train(kl_ctl: float) -> tuple[float, float, list[float]]:
    """PPO for `ITERATIONS` rollouts. Returns the final mean score, KL to the start, and every first ratio."""
    torch.manual_seed(0)
    reference = torch.zeros(WIDTH, WORDS)
    logits, values = reference.clone().requires_grad_(), torch.zeros(WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.03)
    first_ratios = []
    for _ in range(ITERATIONS):
        tokens = torch.distributions.Categorical(logits=logits.detach().expand(BATCH, -1, -1)).sample()
        mask = response_mask(tokens, EOS)
        ended = (tokens == EOS).any(1)
        scores = ((tokens == GOOD) & mask).sum(1).float() - (~ended).float()
        old_logprobs, ref_logprobs = logprobs_of(logits, tokens).detach(), logprobs_of(reference, tokens)
        old_values = values.detach().expand(BATCH, -1)

        kl = kl_penalty(old_logprobs, ref_logprobs, "k1", clamp=10.0)
        rewards = per_token_rewards(scores, kl, mask, kl_ctl)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, mask, *moments_to_mean_var(masked_moments(advantages, mask)))
        for epoch in range(EPOCHS):
            loss, stats = policy_loss(logprobs_of(logits, tokens), old_logprobs, advantages, mask, 0.2, mask.sum())
            critic_loss, _ = value_loss(values.expand(BATCH, -1), old_values, returns, mask, 0.2, mask.sum())
            optimizer.zero_grad()
            (loss + critic_loss).backward()
            optimizer.step()
            if epoch == 0:
                first_ratios.append((stats["ratio_sum"] / stats["tokens"]).item())
    return scores.mean().item(), (masked_sum(kl, mask) / BATCH).item(), first_ratios


@pytest.fixture(scope="module")
def runs():
    return {kl_ctl: train(kl_ctl) for kl_ctl in (0.05, 2.0)}


def test_several_epochs_learn_to_score_and_to_stop(runs):
    score, _, _ = runs[0.05]
    assert score > 2.0  # at the start about 0; the best is 3: three good words and the end


def test_the_price_of_kl_holds_the_policy_back(runs):
    (cheap_score, cheap_kl, _), (dear_score, dear_kl, _) = runs[0.05], runs[2.0]
    assert 0 < dear_kl < 0.5 < cheap_kl
    assert dear_score < cheap_score


def test_the_first_ratio_of_every_rollout_is_exactly_one(runs):
    assert all(ratio == 1.0 for _, _, first_ratios in runs.values() for ratio in first_ratios)
