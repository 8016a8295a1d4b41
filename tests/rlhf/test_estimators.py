"""Advantages over the whole rollout: rows in their order, groups of one prompt, and roles without a critic."""

import random

import pytest
import torch
from rlhf_setup import make_config, make_prompts, make_setup, rollout, save_models

from utils.algorithms.advantages import RewardedTokens
from utils.arguments.choices import ADVANTAGE_ESTIMATORS, Estimator
from utils.arguments.ppo import PpoArguments
from utils.rewards.shaping import Scores
from utils.rlhf.estimators import estimate_advantages, group_numbers
from utils.rlhf.experience import Samples
from utils.rlhf.minibatches import minibatches
from utils.rlhf.updates import update

SEEN: list[RewardedTokens] = []


def above_the_group(table: RewardedTokens, flags: PpoArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token gets its answer's score less the mean score of its group."""
    SEEN.append(table)
    means = torch.stack([table.scores[table.groups == group].mean() for group in table.groups])
    advantages = (table.scores - means)[:, None] * table.mask
    return advantages, advantages


@pytest.fixture
def estimates_by_group(monkeypatch):
    SEEN.clear()
    row = Estimator(code=f"{__name__}:above_the_group", about="for tests", needs_critic=False)
    monkeypatch.setitem(ADVANTAGE_ESTIMATORS, "gae", row)


def sample(rows: tuple[int, ...], lengths: list[int]) -> Samples:
    """A micro-batch of these rows of the rollout; row i has log-probabilities of -i and a reference of -i - 0.5."""
    width, mask = max(lengths), torch.zeros(len(rows), max(lengths), dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    numbers = torch.tensor(rows, dtype=torch.float32)[:, None] * torch.ones(1, width) * mask
    return Samples(
        sequences=torch.zeros(len(rows), 1 + width, dtype=torch.int64),
        attention_mask=torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), mask], 1),
        response_mask=mask,
        rows=rows,
        logprobs=-numbers,
        ref_logprobs=-numbers - 0.5 * mask,
        values=None,
    )


def test_groups_are_the_answers_to_the_same_prompt():
    rows = [{"prompt_ids": ids} for ids in ([1, 2], [3], [1, 2], [1], [3], [1, 2])]
    assert group_numbers(rows).tolist() == [0, 1, 0, 2, 1, 0]


def test_an_estimator_sees_the_rollout_in_its_order_however_it_is_cut(estimates_by_group):
    """Rows of one group lie in different micro-batches and optimiser steps, as a token budget puts them."""
    lengths, groups = [3, 1, 4, 2, 4], torch.tensor([0, 1, 0, 1, 0])
    shaped = torch.tensor([1.0, 5.0, 3.0, 7.0, 8.0])
    config = PpoArguments(whiten_advantages=False)
    outcomes = []
    for cut in ([[(2, 0), (1,)], [(4,), (3,)]], [[(0, 1, 2, 3, 4)]]):
        samples = [[sample(rows, [lengths[row] for row in rows]) for rows in step] for step in cut]
        experience = estimate_advantages(samples, Scores(shaped * 10, shaped), groups, config, kl_ctl=0.1)
        assert [[batch.rows for batch in step] for step in experience] == cut
        found = {}
        for batch in (batch for step in experience for batch in step):
            for place, row in enumerate(batch.rows):
                mask = batch.response_mask[place]
                found[row] = batch.advantages[place][mask].tolist(), batch.rewards[place][mask].tolist()
                assert batch.scores[place] == shaped[row] * 10 and not batch.advantages[place][~mask].any()
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]
    for row, (advantages, rewards) in outcomes[0].items():
        mean = {0: 4.0, 1: 6.0}[int(groups[row])]
        assert advantages == [shaped[row].item() - mean] * lengths[row]
        expected = torch.full((lengths[row],), -0.1 * 0.5)  # the penalty for 0.5 nats, and the score at the end
        expected[-1] += shaped[row]
        torch.testing.assert_close(torch.tensor(rewards), expected)
    for table in SEEN:
        assert table.mask.sum(1).tolist() == lengths and table.values is None
        assert torch.equal(table.scores, shaped) and torch.equal(table.groups, groups)
        assert not table.rewards[~table.mask].any()
    torch.testing.assert_close(SEEN[0].rewards, SEEN[1].rewards)


def test_without_a_critic_only_the_actor_is_loaded_scored_and_updated(estimates_by_group, tiny_tokenizer, tmp_path):
    config = make_config(save_models(tmp_path, tiny_tokenizer), kl_ctl=0.01)
    assert list(config.roles()) == ["actor", "reference", "reward"]
    setup = make_setup(config, tiny_tokenizer)
    assert setup.roles.critic is None and list(setup.roles.trained) == ["actor"]
    prompts = make_prompts(config, len(tiny_tokenizer))
    prompts = [prompts[row // 2] for row in range(len(prompts))]  # two answers to each
    random.Random(0).shuffle(prompts)
    sampled = rollout(setup, prompts, seed=7)
    assert sorted(SEEN[-1].groups.bincount().tolist()) == [2] * (len(prompts) // 2)
    assert all(batch.values is None for batch in sampled.micro_batches)
    assert "ppo/explained_variance" not in sampled.metrics
    before = {name: tensor.clone() for name, tensor in setup.actor.module.state_dict().items()}
    for minibatch in minibatches(sampled.minibatches, config, seed=0):
        metrics = update(setup.roles, minibatch, config, what="test")
    assert any(not torch.equal(before[name], tensor) for name, tensor in setup.actor.module.state_dict().items())
    assert "ppo/actor_grad_norm" in metrics and not [name for name in metrics if "critic" in name or "value" in name]
    setup.roles.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["actor"]
