"""PPO's optimiser steps on a rollout."""

import random
from collections.abc import Sequence

import torch

from utils import distributed
from utils.algorithms.advantages import explained_variance, masked_moments
from utils.algorithms.losses import entropy_loss, policy_loss, value_loss
from utils.divergence import DivergenceGuard
from utils.rlhf.engine import RlhfEngine
from utils.rlhf.experience import Experience, response_logprobs
from utils.zero import optimizer_step


def ppo_minibatches(minibatches: Sequence[Sequence[Experience]], *, seed: int) -> list[Sequence[Experience]]:
    """One epoch over a rollout: its minibatches, each the micro-batches of one optimiser step, in a seeded order."""
    return random.Random(seed).sample(minibatches, len(minibatches))


def ppo_step(
    engine: RlhfEngine,
    minibatch: Sequence[Experience],
    config,
    *,
    what: str,
    train_actor: bool = True,
    unsupervised: Sequence[dict[str, torch.Tensor]] = (),
) -> dict[str, float]:
    """One optimiser step of the actor and one of the critic on the micro-batches of a minibatch.

    Losses are token means over the whole minibatch on all ranks. The unsupervised batches add
    `unsup_coef` times their mean cross-entropy to the actor's loss (Ouyang et al. 2022, equation 2).

    Args:
        what: names the step in an error.
        train_actor: False while the critic warms up.
        unsupervised: collated rows (`input_ids`, `attention_mask`, `target_mask`) in micro-batches, or none.

    Returns:
        Metrics over all ranks, names starting with `ppo/`.
    """
    tokens = distributed.all_reduce_scalar(sum(int(e.response_mask.sum()) for e in minibatch))
    unsupervised_tokens = distributed.all_reduce_scalar(sum(int(batch["target_mask"].sum()) for batch in unsupervised))
    statistics: dict[str, torch.Tensor] = {}

    def add(stats: dict[str, torch.Tensor]) -> None:
        for name, value in stats.items():
            combine = torch.maximum if name.endswith("_max") else torch.add
            statistics[name] = combine(statistics[name], value) if name in statistics else value

    def actor_loss(batch) -> torch.Tensor:
        if not isinstance(batch, Experience):
            logprobs, _ = engine.actor(batch["input_ids"], batch["attention_mask"], batch["target_mask"])
            loss = -logprobs.sum() / unsupervised_tokens
            add({"unsupervised_loss": loss.detach()})
            return config.unsup_coef * loss
        logprobs, entropy = response_logprobs(
            engine.actor, batch.sequences, batch.attention_mask, batch.response_mask,
            temperature=config.temperature, with_entropy=True,
        )  # fmt: skip
        mask = batch.response_mask
        loss, stats = policy_loss(logprobs, batch.logprobs, batch.advantages, mask, config.cliprange, tokens)
        bonus, entropy_stats = entropy_loss(entropy, mask, config.entropy_coef, tokens)
        add(stats | entropy_stats)
        return loss + bonus if config.entropy_coef else loss

    def critic_loss(batch: Experience) -> torch.Tensor:
        values = engine.values(batch.sequences, batch.attention_mask, batch.response_mask)
        loss, stats = value_loss(
            values, batch.values, batch.returns, batch.response_mask, config.cliprange_value, tokens
        )
        add({name: value for name, value in stats.items() if name != "tokens"})
        return loss

    guard = DivergenceGuard(config.on_nan, config.output_dir)
    metrics = {"ppo/critic_lr": engine.critic.get_lr()[0]}  # before the step, which moves the schedule on
    if train_actor:
        metrics["ppo/actor_lr"] = engine.actor.get_lr()[0]
        _, metrics["ppo/actor_grad_norm"] = optimizer_step(
            engine.actor, [*minibatch, *unsupervised], actor_loss, what=f"{what}, actor", guard=guard
        )
        if engine.ema:
            engine.ema.update()
    _, metrics["ppo/critic_grad_norm"] = optimizer_step(
        engine.critic, minibatch, critic_loss, what=f"{what}, critic", guard=guard
    )

    largest = {"ratio_max": statistics.pop("ratio_max")} if train_actor else {}
    unsupervised_loss = statistics.pop("unsupervised_loss", None)
    sums = distributed.all_reduce_dict(statistics)
    names = {
        "policy_loss": "policy_loss",
        "value_loss": "value_loss",
        "approx_kl_k1": "approx_kl_k1",
        "approx_kl_k3": "approx_kl_k3",
        "clip_count": "clip_fraction",
        "value_clip_count": "value_clip_fraction",
        "ratio_sum": "ratio_mean",
        "entropy": "entropy",
    }
    metrics |= {f"ppo/{shown}": sums[name] / tokens for name, shown in names.items() if name in sums}
    metrics |= (
        {f"ppo/{name}": value for name, value in distributed.all_reduce_dict(largest, "max").items()} if largest else {}
    )
    if unsupervised_loss is not None:
        metrics["ppo/unsupervised_loss"] = distributed.all_reduce_scalar(unsupervised_loss)
    return metrics


def mean_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of one iteration from those of its optimiser steps: means, and maxima of what ends in `_max`.

    The first step's mean ratio is kept beside them: it is 1 unless rollout and training disagree.
    """
    combined = {}
    for name in steps[-1]:
        values = [step[name] for step in steps]
        combined[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    if "ppo/ratio_mean" in steps[0]:
        combined["ppo/first_ratio_mean"] = steps[0]["ppo/ratio_mean"]
        combined["ppo/first_ratio_max"] = steps[0]["ppo/ratio_max"]
    return combined


class ExplosionAlarm:
    """One warning in a run when the policy has jumped further than PPO's clip is meant to allow."""

    MOST_RATIO = 100.0  # new over old probability of a token
    MOST_KL = 1.0  # nats per token, between the policy before and after a rollout's update

    def __init__(self) -> None:
        self._has_warned = False

    def check(self, iteration: int, metrics: dict[str, float]) -> None:
        """Look at an iteration's `ppo/ratio_max` and `ppo/approx_kl_k3`, absent while only the critic learns."""
        ratio, kl = metrics.get("ppo/ratio_max", 1.0), metrics.get("ppo/approx_kl_k3", 0.0)
        if not self._has_warned and (ratio > self.MOST_RATIO or kl > self.MOST_KL):
            self._has_warned = True
            distributed.warn(
                f"iteration {iteration}: the policy jumps: largest probability ratio {ratio:.4g} (expected below 10), "
                f"KL of the update {kl:.4g} nats per token (expected below 0.02); lower --actor_learning_rate or "
                "--ppo_epochs. Further jumps are not reported"
            )


def explained_variance_over_ranks(experiences: Sequence[Experience]) -> float:
    """How much of the returns' variance the critic had foreseen at rollout time; 1 is all, 0 is none."""
    returns = sum(masked_moments(e.returns, e.response_mask).cpu() for e in experiences)
    residuals = sum(masked_moments(e.returns - e.values, e.response_mask).cpu() for e in experiences)
    return float(explained_variance(distributed.all_reduce(returns), distributed.all_reduce(residuals)))
