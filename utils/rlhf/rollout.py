"""From prompts to experience: sample responses, score them with all four models, and turn scores into advantages."""

import itertools
import time
from dataclasses import dataclass

import torch

from utils import distributed, watchdog
from utils.algorithms.advantages import gae, masked_moments, moments_to_mean_var, whiten
from utils.algorithms.kl import kl_penalty, normalize_scores, per_token_rewards
from utils.algorithms.masking import last_index, masked_sum
from utils.data.collate import pad
from utils.data.packing import token_batches
from utils.rlhf.engine import RlhfEngine
from utils.rlhf.experience import Experience, response_logprobs
from utils.rlhf.responses import Generation
from utils.rlhf.sampling import SamplingParams


@dataclass(frozen=True)
class Rollout:
    """A rollout of this rank, in the micro-batches of each optimiser step, and numbers over all ranks."""

    minibatches: list[list[Experience]]
    metrics: dict[str, float]
    kl: float  # mean over all ranks' sequences of the k1 estimate summed over their tokens, in nats
    num_sequences: int  # over all ranks

    @property
    def micro_batches(self) -> list[Experience]:
        """Those of all optimiser steps."""
        return [micro_batch for minibatch in self.minibatches for micro_batch in minibatch]


def rollout(engine: RlhfEngine, prompts: list[list[int]], config, *, kl_ctl: float, seed: int) -> Rollout:
    """Sample one response per prompt and compute everything that PPO needs.

    Rows are scored in exactly the micro-batches that train, so the first epoch's first ratio is 1 to the last bit.

    Args:
        prompts: token ids of this rank's prompts.
        config: step 3's.
        kl_ctl: price of a nat of KL to the reference.
        seed: of this rollout's samples.
    """
    started = clock()
    responses = generate_responses(engine, prompts, sampling_params(config), seed=seed)
    generated = clock()

    watchdog.alive("scoring")
    plan = plan_minibatches(prompts, responses, config)
    rows = [part for minibatch in plan for part in minibatch]
    experiences = [
        score(
            engine,
            *assemble(prompts, responses, part, engine.tokenizer.pad_token_id),
            responses.ended[part],
            config=config,
            kl_ctl=kl_ctl,
        )
        for part in rows
    ]
    experiences = whiten_over_ranks(experiences, config)
    finished = clock()

    metrics = rollout_metrics(experiences, engine, responses)
    if responses.logprobs is not None:
        metrics |= sampling_difference(experiences, responses, [row for part in rows for row in part])
    tokens = metrics.pop("response_tokens")
    metrics |= {
        "time/generation": generated - started,
        "time/scoring": finished - generated,
        "throughput/generation_tokens_per_second": tokens / (generated - started),
    }
    remaining = iter(experiences)
    minibatches = [list(itertools.islice(remaining, len(minibatch))) for minibatch in plan]
    return Rollout(minibatches, metrics, metrics["ppo/kl_k1"], int(metrics["ppo/sequences"]))


def clock() -> float:
    """Seconds, read when the device has done all that it was given: a GPU works on after a call has returned."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def plan_minibatches(prompts: list[list[int]], responses: Generation, config) -> list[list[list[int]]]:
    """Which rows make up the micro-batches of each optimiser step: minibatches of micro-batches of row numbers.

    A step has per_device_training_batch_size x gradient_accumulation_steps rows. `--max_tokens_per_batch` regroups
    them by length.
    """
    size = config.per_device_training_batch_size
    lengths = [len(prompt) + count for prompt, count in zip(prompts, responses.mask.sum(1).tolist(), strict=True)]
    plan = []
    for start in range(0, len(prompts), size * config.gradient_accumulation_steps):
        rows = list(range(start, start + size * config.gradient_accumulation_steps))
        if config.max_tokens_per_batch:
            parts = token_batches([lengths[row] for row in rows], config.max_tokens_per_batch)
            plan.append([[rows[index] for index in part] for part in parts])
        else:
            plan.append([rows[first : first + size] for first in range(0, len(rows), size)])
    return plan


def sampling_params(config, *, greedy: bool = False) -> SamplingParams:
    """Step 3's sampling flags as the generation interface takes them."""
    return SamplingParams(
        max_new_tokens=config.max_answer_seq_len,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        greedy=greedy,
    )


def generate_responses(
    engine: RlhfEngine, prompts: list[list[int]], sampling: SamplingParams, *, seed: int
) -> Generation:
    """Responses of the current actor."""
    watchdog.alive("generation")
    return engine.hybrid.respond(prompts, sampling, seed=seed)


def assemble(
    prompts: list[list[int]], responses: Generation, rows: list[int], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts and responses of `rows` as (B, P+R) sequences, attention mask, and (B, R) response mask.

    P and R are the longest prompt and response among these rows.
    """
    prompt_ids, prompt_mask = (
        tensor.to(responses.tokens.device) for tensor in pad([prompts[row] for row in rows], pad_id, left=True)
    )
    mask = responses.mask[rows]
    width = int(mask.sum(1).max())
    mask = mask[:, :width]
    sequences = torch.cat([prompt_ids, responses.tokens[rows, :width]], 1)
    return sequences, torch.cat([prompt_mask.bool(), mask], 1), mask


@torch.no_grad()
def response_scores(engine: RlhfEngine, sequences, attention_mask, response_mask) -> torch.Tensor:
    """(B,) the reward model's score at the last response token."""
    values = engine.reward(sequences, attention_mask)
    first = sequences.size(1) - response_mask.size(1)
    return values.gather(1, (first + last_index(response_mask))[:, None]).squeeze(1)


@torch.no_grad()
def score(engine: RlhfEngine, sequences, attention_mask, response_mask, ended, *, config, kl_ctl: float) -> Experience:
    """One micro-batch of rollouts with its log-probabilities, values, rewards and (not yet whitened) advantages."""
    batch = (sequences, attention_mask, response_mask)
    logprobs, _ = response_logprobs(engine.actor, *batch, temperature=config.temperature)
    ref_logprobs = engine.reference_logprobs(*batch, temperature=config.temperature)
    values = engine.values(*batch)
    scores = response_scores(engine, *batch)

    normalized = normalize_scores(scores, engine.score_mean, engine.score_std, config.clip_reward_value)
    normalized = normalized - config.missing_eos_penalty * (~ended).float()
    kl = kl_penalty(logprobs, ref_logprobs, config.kl_estimator, config.kl_clamp)
    rewards = per_token_rewards(normalized, kl, response_mask, kl_ctl)
    advantages, returns = gae(rewards, values, response_mask, config.gamma, config.lam)
    return Experience(
        sequences=sequences,
        attention_mask=attention_mask,
        response_mask=response_mask,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def _moments(pairs) -> torch.Tensor:
    """(3,) `masked_moments` of (tensor, mask) pairs, summed over them and over all ranks."""
    return distributed.all_reduce(sum(masked_moments(values, mask).cpu() for values, mask in pairs))


def whiten_over_ranks(experiences: list[Experience], config) -> list[Experience]:
    """Rewards (mean kept) and advantages whitened over the whole rollout of all ranks, as configured."""
    if config.whiten_rewards:
        mean, var = moments_to_mean_var(_moments((e.rewards, e.response_mask) for e in experiences))
        rescaled = []
        for e in experiences:
            rewards = whiten(e.rewards, e.response_mask, mean, var, shift_mean=False)
            advantages, returns = gae(rewards, e.values, e.response_mask, config.gamma, config.lam)
            rescaled.append(_replace(e, rewards=rewards, advantages=advantages, returns=returns))
        experiences = rescaled
    if config.whiten_advantages:
        mean, var = moments_to_mean_var(_moments((e.advantages, e.response_mask) for e in experiences))
        experiences = [_replace(e, advantages=whiten(e.advantages, e.response_mask, mean, var)) for e in experiences]
    return experiences


def _replace(experience: Experience, **changes: torch.Tensor) -> Experience:
    return Experience(**(vars(experience) | changes))


def rollout_metrics(experiences: list[Experience], engine: RlhfEngine, responses: Generation) -> dict[str, float]:
    """Numbers of a rollout over all ranks: scores, KL to the reference, lengths, share of responses that ended."""
    lengths = [e.response_mask.sum(1).float() for e in experiences]
    sums = {
        "sequences": sum(len(e.scores) for e in experiences),
        "tokens": sum(length.sum() for length in lengths),
        "ended": responses.ended.sum(),
        "reward": sum(e.rewards.sum() for e in experiences),
        "k1": sum(masked_sum(kl_penalty(e.logprobs, e.ref_logprobs, "k1", 1e9), e.response_mask) for e in experiences),
        "k3": sum(masked_sum(kl_penalty(e.logprobs, e.ref_logprobs, "k3", 1e9), e.response_mask) for e in experiences),
    }
    sums = distributed.all_reduce_dict(sums)
    count = sums["sequences"]
    everything = [torch.ones_like(e.scores, dtype=torch.bool) for e in experiences]
    scores = [e.scores for e in experiences]
    score_mean, score_var = moments_to_mean_var(_moments(zip(scores, everything, strict=True)))
    length_mean, length_var = moments_to_mean_var(_moments(zip(lengths, everything, strict=True)))
    metrics = {
        "ppo/score_mean": score_mean.item(),
        "ppo/score_std": score_var.sqrt().item(),
        "ppo/score_normalized": (score_mean.item() - engine.score_mean) / engine.score_std,
        "ppo/reward_mean": sums["reward"] / count,
        "ppo/kl_k1": sums["k1"] / count,
        "ppo/kl_k3": sums["k3"] / count,
        "ppo/length_mean": length_mean.item(),
        "ppo/length_std": length_var.sqrt().item(),
        "ppo/ended_fraction": sums["ended"] / count,
        "ppo/sequences": count,
        "response_tokens": sums["tokens"],
    }
    return metrics


def sampling_difference(experiences: list[Experience], responses: Generation, rows: list[int]) -> dict[str, float]:
    """How far the log-probabilities of generation are from those of the training forward, per token, over all ranks.

    Args:
        rows: number of each sequence of `experiences`, in their order, among `responses`.
    """
    trained = torch.cat([e.logprobs[e.response_mask] for e in experiences])
    difference = (trained - responses.logprobs[rows][responses.mask[rows]]).abs()
    sums = distributed.all_reduce_dict({"sum": difference.sum(), "tokens": difference.numel()})
    return {
        "ppo/sampling_logprob_difference_mean": sums["sum"] / sums["tokens"],
        "ppo/sampling_logprob_difference_max": distributed.all_reduce_scalar(difference.max(), "max"),
    }
