"""The numbers of a rollout and its updates, over all ranks."""

import math
import time
from collections.abc import Iterable, Sequence

import torch

from utils.algorithms.advantages import explained_variance, masked_moments, moments_to_mean_var
from utils.algorithms.kl import adaptive_kl_ctl, kl_penalty
from utils.algorithms.masking import masked_sum
from utils.arguments.ppo import PpoArguments
from utils.generation.responses import Responses
from utils.parallel import distributed
from utils.rewards.shaping import Reward
from utils.rlhf.experience import Experience, Rollout

PHASES = ("generation", "scoring", "training")
NO_CLAMP = 1e9


class PhaseClock:
    """Seconds of the phases of an iteration; each reading waits for the device."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = _now()

    def end_of(self, phase: str) -> None:
        """The phase began when the one before it ended."""
        now = _now()
        self.seconds[phase], self._since = now - self._since, now


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def rollout_metrics(rollout: Rollout, reward: Reward, responses: Responses) -> dict[str, float]:
    """Scores, KL to the reference, lengths, share of responses that ended, explained variance."""
    batches = [batch for step in rollout for batch in step]
    lengths = [batch.response_mask.sum(1).float() for batch in batches]
    sums = {
        "sequences": sum(len(batch.scores) for batch in batches),
        "ended": responses.ended.sum(),
        "reward": sum(batch.rewards.sum() for batch in batches),
        "k1": sum(_unclamped_kl(batch, "k1") for batch in batches),
        "k3": sum(_unclamped_kl(batch, "k3") for batch in batches),
    }
    sums = distributed.all_reduce_dict(sums)
    count = sums["sequences"]
    score_mean, score_std = _mean_and_std(batch.scores for batch in batches)
    length_mean, length_std = _mean_and_std(lengths)
    metrics = {
        "ppo/score_mean": score_mean,
        "ppo/score_std": score_std,
        "ppo/score_normalized": reward.normalized(score_mean),
        "ppo/reward_mean": sums["reward"] / count,
        "ppo/kl_k1": sums["k1"] / count,
        "ppo/kl_k3": sums["k3"] / count,
        "ppo/length_mean": length_mean,
        "ppo/length_std": length_std,
        "ppo/ended_fraction": sums["ended"] / count,
        "ppo/sequences": count,
    }
    if batches[0].values is not None:
        metrics["ppo/explained_variance"] = _explained_variance(batches)
    return metrics | sampling_difference(batches, responses)


def update_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of one iteration from those of its optimiser steps: means, and maxima of what ends in `_max`.

    The first step's ratio is kept separately: it is 1 unless rollout and training disagree.
    """
    combined = {}
    for name in steps[-1]:
        values = [step[name] for step in steps]
        combined[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    if "ppo/ratio_mean" in steps[0]:
        combined["ppo/first_ratio_mean"] = steps[0]["ppo/ratio_mean"]
        combined["ppo/first_ratio_max"] = steps[0]["ppo/ratio_max"]
    return combined


def speed_metrics(clock: PhaseClock, metrics: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, and sequences and response tokens of all ranks per second."""
    seconds = sum(clock.seconds[phase] for phase in PHASES)
    sequences, tokens = metrics["ppo/sequences"], metrics["ppo/sequences"] * metrics["ppo/length_mean"]
    return {f"time/{phase}": clock.seconds[phase] for phase in PHASES} | {
        "throughput/generation_tokens_per_second": tokens / clock.seconds["generation"],
        "throughput/samples_per_second": sequences / seconds,
        "throughput/tokens_per_second": tokens / seconds,
    }


def next_kl_ctl(kl_ctl: float, metrics: dict[str, float], config: PpoArguments) -> float:
    """The KL coefficient of the next rollout; with `--kl_target` it follows the KL of this one."""
    kl = metrics["ppo/kl_k1"]
    if config.kl_target is None or not math.isfinite(kl):  # not finite with --on_nan skip
        return kl_ctl
    return adaptive_kl_ctl(kl_ctl, kl, config.kl_target, config.kl_horizon, int(metrics["ppo/sequences"]))


def sampling_difference(batches: Sequence[Experience], responses: Responses) -> dict[str, float]:
    """How far the log-probabilities of generation are from those of the training forward, per token, over all ranks.

    Empty where `transformers` has generated, which returns no log-probabilities.
    """
    if responses.logprobs is None:
        return {}
    rows = [row for batch in batches for row in batch.rows]
    trained = torch.cat([batch.logprobs[batch.response_mask] for batch in batches])
    difference = (trained - responses.logprobs[rows][responses.mask[rows]]).abs()
    sums = distributed.all_reduce_dict({"sum": difference.sum(), "tokens": difference.numel()})
    return {
        "ppo/sampling_logprob_difference_mean": sums["sum"] / sums["tokens"],
        "ppo/sampling_logprob_difference_max": distributed.all_reduce_scalar(difference.max(), "max"),
    }


class ExplosionAlarm:
    """Warns once per run if the policy has moved further than PPO's clip is meant to allow."""

    MOST_RATIO = 100.0  # new over old probability of a token
    MOST_KL = 1.0  # nats per token, between the policy before and after a rollout's update

    def __init__(self) -> None:
        self._has_warned = False

    def check(self, iteration: int, metrics: dict[str, float]) -> None:
        """Check an iteration's `ppo/ratio_max` and `ppo/approx_kl_k3`, absent while only the critic learns."""
        ratio, kl = metrics.get("ppo/ratio_max", 1.0), metrics.get("ppo/approx_kl_k3", 0.0)
        if not self._has_warned and (ratio > self.MOST_RATIO or kl > self.MOST_KL):
            self._has_warned = True
            distributed.warn(
                f"iteration {iteration}: the policy changed too much: largest probability ratio {ratio:.4g} (expected "
                f"below 10), KL of the update {kl:.4g} nats per token (expected below 0.02); lower "
                "--actor_learning_rate or --ppo_epochs. This warning is shown once"
            )


def _unclamped_kl(batch: Experience, estimator: str) -> torch.Tensor:
    return masked_sum(kl_penalty(batch.logprobs, batch.ref_logprobs, estimator, NO_CLAMP), batch.response_mask)


def _mean_and_std(tensors: Iterable[torch.Tensor]) -> tuple[float, float]:
    """Over all values of all ranks."""
    moments = sum(masked_moments(tensor, torch.ones_like(tensor, dtype=torch.bool)).cpu() for tensor in tensors)
    mean, var = moments_to_mean_var(distributed.all_reduce(moments))
    return mean.item(), var.sqrt().item()


def _explained_variance(batches: Sequence[Experience]) -> float:
    """How much of the returns' variance the critic predicted at rollout time; 1 is all, 0 is none."""
    returns = sum(masked_moments(batch.returns, batch.response_mask).cpu() for batch in batches)
    residuals = sum(masked_moments(batch.returns - batch.values, batch.response_mask).cpu() for batch in batches)
    return float(explained_variance(distributed.all_reduce(returns), distributed.all_reduce(residuals)))
