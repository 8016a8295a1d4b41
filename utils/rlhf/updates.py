"""PPO's optimiser steps on a rollout."""

from collections.abc import Sequence

import torch

from utils.algorithms.policy_losses import entropy_loss, policy_loss, value_loss
from utils.arguments.steps import PpoConfig
from utils.parallel import distributed
from utils.parallel.divergence import DivergenceGuard, TokenIds, collated_tokens, real_tokens
from utils.parallel.updates import optimizer_step
from utils.rlhf.experience import Experience
from utils.rlhf.minibatches import Minibatch
from utils.rlhf.roles import Roles

Texts = dict[str, torch.Tensor]  # a collated batch: input_ids, attention_mask, target_mask

# Sums of an optimiser step, and what their means over its tokens are called.
MEANS = {
    "policy_loss": "policy_loss",
    "value_loss": "value_loss",
    "approx_kl_k1": "approx_kl_k1",
    "approx_kl_k3": "approx_kl_k3",
    "clip_count": "clip_fraction",
    "value_clip_count": "value_clip_fraction",
    "ratio_sum": "ratio_mean",
    "entropy": "entropy",
}


def update(
    roles: Roles,
    minibatch: Minibatch,
    config: PpoConfig,
    *,
    what: str,
    train_actor: bool = True,
    texts: Sequence[Texts] = (),
) -> dict[str, float]:
    """One optimiser step of each role that learns, on the micro-batches of a minibatch.

    Losses are token means over the whole minibatch on all ranks.

    Args:
        what: name of the step for error messages.
        train_actor: False while the critic warms up.
        texts: add `unsup_coef` times their mean cross-entropy to the actor's loss (Ouyang et al. 2022, equation 2).

    Returns:
        Metrics over all ranks, names starting with `ppo/`.
    """
    tokens = distributed.all_reduce_scalar(sum(int(batch.response_mask.sum()) for batch in minibatch))
    sums, metrics = StepSums(), {}
    guard = DivergenceGuard(config.on_nan, config.output_dir, token_ids)
    if roles.critic:
        metrics["ppo/critic_lr"] = roles.critic.engine.get_lr()[0]  # before the step, which advances the schedule
    if train_actor:
        metrics["ppo/actor_lr"] = roles.actor.engine.get_lr()[0]
        losses = actor_losses(roles, config, sums, tokens, texts)
        batches = [*minibatch, *texts]
        _, norm = optimizer_step(roles.actor.engine, batches, losses, what=f"{what}, actor", guard=guard)
        metrics["ppo/actor_grad_norm"] = norm
        if roles.average:
            roles.average.update()
    if roles.critic:
        losses = critic_losses(roles, config, sums, tokens)
        _, norm = optimizer_step(roles.critic.engine, minibatch, losses, what=f"{what}, critic", guard=guard)
        metrics["ppo/critic_grad_norm"] = norm
    return metrics | sums.metrics(tokens)


def actor_losses(roles: Roles, config: PpoConfig, sums: "StepSums", tokens: float, texts: Sequence[Texts]):
    """The actor's loss of a micro-batch, its share of the mean over the `tokens` of the step."""
    text_tokens = distributed.all_reduce_scalar(sum(int(batch["target_mask"].sum()) for batch in texts))

    def loss_of(batch: Experience | Texts) -> torch.Tensor:
        if not isinstance(batch, Experience):
            logprobs, _ = roles.actor.engine(batch["input_ids"], batch["attention_mask"], batch["target_mask"])
            loss = -logprobs.sum() / text_tokens
            sums.add({"unsupervised_loss": loss.detach()})
            return config.unsup_coef * loss
        logprobs, entropy = roles.actor.logprobs(batch, temperature=config.temperature, with_entropy=True)
        mask = batch.response_mask
        loss, stats = policy_loss(logprobs, batch.logprobs, batch.advantages, mask, config.cliprange, tokens)
        bonus, entropy_stats = entropy_loss(entropy, mask, config.entropy_coef, tokens)
        sums.add(stats | entropy_stats)
        return loss + bonus if config.entropy_coef else loss

    return loss_of


def critic_losses(roles: Roles, config: PpoConfig, sums: "StepSums", tokens: float):
    """The critic's loss of a micro-batch, its share of the mean over the `tokens` of the step."""

    def loss_of(batch: Experience) -> torch.Tensor:
        values = roles.critic.values(batch)
        loss, stats = value_loss(
            values, batch.values, batch.returns, batch.response_mask, config.cliprange_value, tokens
        )
        sums.add(stats)
        return loss

    return loss_of


class StepSums:
    """Statistics of one optimiser step, summed over its micro-batches; those that end in `_max` are maxima."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, stats: dict[str, torch.Tensor]) -> None:
        for name, value in stats.items():
            combine = torch.maximum if name.endswith("_max") else torch.add
            self._sums[name] = combine(self._sums[name], value) if name in self._sums else value

    def metrics(self, tokens: float) -> dict[str, float]:
        """Over all ranks, means over `tokens`, names starting with `ppo/`."""
        largest = {name: value for name, value in self._sums.items() if name.endswith("_max")}
        text_loss = self._sums.get("unsupervised_loss")
        sums = {name: value for name, value in self._sums.items() if name in MEANS}
        sums = distributed.all_reduce_dict(sums)
        metrics = {f"ppo/{shown}": sums[name] / tokens for name, shown in MEANS.items() if name in sums}
        if largest:
            metrics |= {f"ppo/{name}": value for name, value in distributed.all_reduce_dict(largest, "max").items()}
        if text_loss is not None:
            metrics["ppo/unsupervised_loss"] = distributed.all_reduce_scalar(text_loss)
        return metrics


def token_ids(batch: Experience | Texts) -> TokenIds:
    """The ids of each row of a micro-batch, without padding."""
    return (
        real_tokens(batch.sequences, batch.attention_mask) if isinstance(batch, Experience) else collated_tokens(batch)
    )
