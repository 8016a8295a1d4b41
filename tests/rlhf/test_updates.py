"""PPO's updates: the first ratio, what moves and what must not, and two ranks against one."""

import pytest
import torch
from processes import run_ranks
from rlhf_setup import make_config, make_prompts, make_setup, rollout, save_models

from utils.rlhf.experience import response_logprobs
from utils.rlhf.metrics import update_metrics
from utils.rlhf.minibatches import minibatches
from utils.rlhf.updates import update


@pytest.fixture(scope="module")
def paths(tiny_tokenizer, tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), tiny_tokenizer)


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(before, module):
    return {name for name, parameter in module.named_parameters() if not torch.equal(before[name], parameter)}


def iterate(setup, *, seed=7, **step_options):
    config = setup.config
    samples = rollout(setup, make_prompts(config, len(setup.tokenizer)), seed=seed)
    steps = [
        update(setup.roles, minibatch, config, what="test", **step_options)
        for minibatch in minibatches(samples.minibatches, config, seed=0)
    ]
    return samples, steps


@pytest.mark.parametrize(
    "flags",
    [
        {"dtype": "fp32"},
        {"dtype": "bf16"},
        {"dtype": "bf16", "actor_zero_stage": 3, "critic_zero_stage": 3, "actor_gradient_checkpointing": True},
        {"dtype": "fp32", "actor_lora_dim": 4, "critic_lora_dim": 4, "only_optimize_lora": True},
    ],
    ids=["fp32", "bf16", "bf16-zero3-checkpointing", "lora"],
)
def test_first_ratio_is_exactly_one_although_the_models_ask_for_dropout(paths, tiny_tokenizer, flags):
    config = make_config(paths, ppo_epochs=2, **flags)
    _, steps = iterate(make_setup(config, tiny_tokenizer))
    combined = update_metrics(steps)
    assert combined["ppo/first_ratio_mean"] == 1.0 and combined["ppo/first_ratio_max"] == 1.0
    assert steps[0]["ppo/approx_kl_k1"] == 0.0 and steps[0]["ppo/clip_fraction"] == 0.0
    assert steps[-1]["ppo/ratio_max"] > 1.0


def test_loss_equals_the_formula_on_one_minibatch(paths, tiny_tokenizer):
    config = make_config(paths, per_device_generation_batch_size=8, generation_batches=1)
    setup = make_setup(config, tiny_tokenizer)
    samples = rollout(setup, make_prompts(config, len(tiny_tokenizer)), seed=7)
    minibatch = samples.minibatches[0]
    update(setup.roles, minibatch, config, what="move away from ratio 1")
    policy, value, count = 0.0, 0.0, 0
    for e in minibatch:
        with torch.no_grad():
            logprobs, _ = response_logprobs(setup.actor, e)
            values = setup.roles.critic.values(e)
        for row, column in e.response_mask.nonzero().tolist():
            ratio = (logprobs[row, column] - e.logprobs[row, column]).exp().item()
            advantage, old, target = (t[row, column].item() for t in (e.advantages, e.values, e.returns))
            policy += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
            v = values[row, column].item()
            clipped = min(max(v, old - 0.2), old + 0.2)
            value += 0.5 * max((v - target) ** 2, (clipped - target) ** 2)
            count += 1
    metrics = update(setup.roles, minibatch, config, what="test")
    assert metrics["ppo/policy_loss"] == pytest.approx(policy / count, abs=1e-5)
    assert metrics["ppo/value_loss"] == pytest.approx(value / count, rel=1e-4)


def test_reference_and_reward_never_move_and_the_critic_has_its_own_head(paths, tiny_tokenizer):
    config = make_config(paths)
    setup = make_setup(config, tiny_tokenizer)
    modules = setup.modules()
    before = {role: weights(module) for role, module in modules.items()}
    assert set(modules) == {"actor", "reference", "critic", "reward"}
    assert torch.equal(before["critic"]["model.score.weight"], before["reward"]["model.score.weight"])
    iterate(setup)
    assert not any(changed(before[role], modules[role]) for role in ("reference", "reward"))
    assert len(changed(before["actor"], modules["actor"])) == len(before["actor"])
    assert "model.score.weight" in changed(before["critic"], modules["critic"])
    after = weights(modules["critic"])
    iterate(setup, seed=8)
    assert len(changed(after, modules["critic"])) == len(after)  # nothing restores the reward head


def test_shared_reference_is_the_sft_model(paths, tiny_tokenizer):
    config = make_config(paths, actor_lora_dim=4, only_optimize_lora=True)
    setup = make_setup(config, tiny_tokenizer)
    assert setup.roles.reference.engine is setup.actor and not setup.roles.frozen
    samples, _ = iterate(setup)
    assert samples.metrics["ppo/kl_k3"] == 0.0  # an untrained adapter changes nothing
    samples, _ = iterate(setup, seed=8)
    assert samples.metrics["ppo/kl_k3"] > 0.0  # a trained one is switched off for the reference
    separate = make_setup(make_config(paths), tiny_tokenizer)
    e = samples.micro_batches[0]
    with torch.no_grad():
        expected, _ = separate.roles.reference.logprobs(e, temperature=1.0)
    torch.testing.assert_close(e.ref_logprobs, expected, atol=1e-5, rtol=1e-5)


def test_critic_warms_up_alone(paths, tiny_tokenizer):
    config = make_config(paths)
    setup = make_setup(config, tiny_tokenizer)
    actor, critic = setup.actor.module, setup.roles.critic.engine.module
    before = {"actor": weights(actor), "critic": weights(critic)}
    _, steps = iterate(setup, train_actor=False)
    assert not changed(before["actor"], actor) and changed(before["critic"], critic)
    assert "ppo/policy_loss" not in update_metrics(steps) and "ppo/value_loss" in update_metrics(steps)


def test_entropy_bonus_raises_entropy(paths, tiny_tokenizer):
    entropies = {}
    for coefficient in (0.0, 5.0):
        config = make_config(paths, entropy_coef=coefficient, ppo_epochs=4)
        _, steps = iterate(make_setup(config, tiny_tokenizer))
        entropies[coefficient] = steps[-1]["ppo/entropy"] - steps[0]["ppo/entropy"]
    assert entropies[5.0] > entropies[0.0] and entropies[5.0] > 0


def test_unsupervised_text_adds_its_mean_loss(paths, tiny_tokenizer):
    config = make_config(paths, unsup_coef=3.0)
    setup = make_setup(config, tiny_tokenizer)
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    targets = mask.clone()
    targets[:, 0] = False
    text = {"input_ids": ids, "attention_mask": mask, "target_mask": targets}
    samples = rollout(setup, make_prompts(config, len(tiny_tokenizer)), seed=7)
    minibatch = samples.minibatches[0]
    with torch.no_grad():
        logits = setup.modules()["reference"].model(ids).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    losses = [
        update(setup.roles, minibatch, config, what="test", texts=[text, text])["ppo/unsupervised_loss"]
        for _ in range(4)
    ]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def test_moving_average_follows_every_step_and_leaves_the_actor_alone(paths, tiny_tokenizer, monkeypatch):
    config = make_config(paths, enable_ema=True, ema_decay=0.9)
    setup = make_setup(config, tiny_tokenizer)
    average, actor = setup.roles.average, setup.actor.module
    expected, steps, follow = weights(actor), [], average.update

    def recompute():
        follow()
        steps.append(weights(actor))
        for name, weight in steps[-1].items():
            expected[name] = 0.9 * expected[name] + 0.1 * weight

    monkeypatch.setattr(average, "update", recompute)
    for seed in range(2):  # of 8 rows each, 4 to an optimiser step
        iterate(setup, seed=seed)
    assert len(steps) == 4 and changed(steps[-2], actor)
    with average.applied():
        torch.testing.assert_close(weights(actor), expected, atol=1e-6, rtol=1e-6)
    assert not changed(steps[-1], actor)


def test_moving_average_is_the_formula():
    from utils.rlhf.ema import ExponentialMovingAverage

    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    average = ExponentialMovingAverage(layer, decay=0.75)
    for weight in (2.0, 4.0):
        layer.weight.data.fill_(weight)
        average.update()
    with average.applied():
        assert layer.weight.item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4)
    assert layer.weight.item() == 4.0


def budgeted_steps(paths, tokenizer, budget: int):
    config = make_config(paths, max_tokens_per_batch=budget, per_device_generation_batch_size=8, max_answer_seq_len=30)
    setup = make_setup(config, tokenizer)
    samples, steps = iterate(setup)
    return samples, steps, weights(setup.actor.module) | weights(setup.roles.critic.engine.module)


def test_a_token_budget_changes_the_micro_batches_and_not_the_result(paths, tiny_tokenizer):
    samples, steps, after = budgeted_steps(paths, tiny_tokenizer, 0)
    assert [[len(e.scores) for e in minibatch] for minibatch in samples.minibatches] == [[2, 2]] * 4
    regrouped, budgeted, budgeted_after = budgeted_steps(paths, tiny_tokenizer, 46)
    sizes = [[len(e.scores) for e in minibatch] for minibatch in regrouped.minibatches]
    assert all(sum(minibatch) == 4 for minibatch in sizes) and sizes != [[2, 2]] * 4
    for micro_batch in regrouped.micro_batches:
        assert micro_batch.attention_mask.sum() <= 46
    assert regrouped.metrics.keys() == samples.metrics.keys()
    for name, value in samples.metrics.items():
        if name.startswith("ppo/"):
            assert regrouped.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert budgeted[0]["ppo/ratio_max"] == 1.0
    for name in steps[0]:
        assert budgeted[0][name] == pytest.approx(steps[0][name], rel=1e-3, abs=1e-5), name
    for name, weight in after.items():
        torch.testing.assert_close(budgeted_after[name], weight, atol=2e-4, rtol=0)


# --- ranks -----------------------------------------------------------------------------------------------------------


def ranks_rollout_and_step(paths, tokenizer_path, stage, halves):
    """One iteration; `halves` ranks share the prompts of a single rank. A prompt's samples are its own."""
    from utils.models.tokenizer import load_tokenizer
    from utils.parallel import distributed

    tokenizer = load_tokenizer(tokenizer_path)
    config = make_config(
        paths, actor_zero_stage=stage, critic_zero_stage=stage, generation_batches=1, temperature=0.7,
        per_device_generation_batch_size=8 // halves, gradient_accumulation_steps=4 // halves,
    )  # fmt: skip
    whole = make_config(paths, generation_batches=1, per_device_generation_batch_size=8)
    prompts = make_prompts(whole, len(tokenizer))
    setup = make_setup(config, tokenizer)
    samples = rollout(setup, prompts[distributed.rank() :: halves], seed=1)
    minibatch = samples.micro_batches
    metrics = update(setup.roles, minibatch, config, what="test")
    responses = sorted(row[mask].tolist() for e in samples.micro_batches for row, mask in zip(
        e.sequences[:, -e.response_mask.size(1) :], e.response_mask, strict=True))  # fmt: skip
    return samples.metrics | metrics, responses


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_two_ranks_give_the_gradients_of_one(paths, stage, tiny_tokenizer):
    path = paths["actor_model_name_or_path"]
    ((alone, responses),) = run_ranks(ranks_rollout_and_step, 1, paths, path, stage, 1)
    (first, first_responses), (second, second_responses) = run_ranks(ranks_rollout_and_step, 2, paths, path, stage, 2)
    assert sorted(first_responses + second_responses) == responses
    for name in alone:
        if name.startswith("ppo/"):
            assert first[name] == second[name], name
            assert first[name] == pytest.approx(alone[name], rel=2e-3, abs=2e-4), name


def ranks_of_unequal_length(paths, tokenizer_path, stage):
    """Rank 1 may write ten tokens, rank 0 two; a collective per token would hang."""
    import dataclasses

    from utils.models.tokenizer import load_tokenizer
    from utils.parallel import distributed

    tokenizer = load_tokenizer(tokenizer_path)
    config = make_config(paths, actor_zero_stage=stage, critic_zero_stage=stage, ppo_epochs=2)
    setup = make_setup(config, tokenizer)
    short = dataclasses.replace(config, max_answer_seq_len=2) if distributed.rank() == 0 else config
    metrics = []
    for seed in range(2):
        samples = rollout(setup, make_prompts(config, len(tokenizer)), short, seed=seed)
        for minibatch in minibatches(samples.minibatches, config, seed=seed):
            metrics.append(update(setup.roles, minibatch, config, what="test"))
    return metrics


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_with_unequal_lengths_do_not_hang(paths, stage):
    first, second = run_ranks(ranks_of_unequal_length, 2, paths, paths["actor_model_name_or_path"], stage)
    assert first == second


def distances_from_the_average(paths, tokenizer_path) -> tuple[float, float, int]:
    """How far the whole weights are from the average while it is applied, how far from what they were before it was
    applied when it is no longer, and how many parameters stay whole between steps, as small ones do under ZeRO-3.
    """
    from utils.models.tokenizer import load_tokenizer
    from utils.parallel.zero import gathered

    def whole(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """The whole parameters, of which `parts` are this rank's shards."""
        gathered_parts = [[torch.empty_like(part) for _ in range(2)] for part in parts]
        for part, both in zip(parts, gathered_parts, strict=True):
            torch.distributed.all_gather(both, part.contiguous())
        flat = [torch.cat([part.flatten() for part in both]) for both in gathered_parts]
        return [row[: p.ds_numel].view(p.ds_shape) for row, p in zip(flat, average.averaged, strict=True)]

    def distance(expected: list[torch.Tensor]) -> float:
        with gathered(average.averaged):
            return max((p - e).abs().max().item() for p, e in zip(average.averaged, expected, strict=True))

    tokenizer = load_tokenizer(tokenizer_path)
    stages = {"actor_zero_stage": 3, "critic_zero_stage": 3}
    setup = make_setup(make_config(paths, enable_ema=True, ema_decay=0.5, **stages), tokenizer)
    average = setup.roles.average
    iterate(setup)
    stay = sum(p.ds_status.name == "AVAILABLE" for p in average.averaged)
    weights_now = whole([p.ds_tensor.detach().clone() for p in average.averaged])
    with average.applied():
        applied = distance(whole(average.shadow))
    return applied, distance(weights_now), stay


def test_an_average_under_zero3_is_whole_straight_after_a_step(paths):
    arguments = paths, paths["actor_model_name_or_path"]
    for applied, restored, stay in run_ranks(distances_from_the_average, 2, *arguments):
        assert stay > 0, "the test must see parameters that are whole and have parts"
        assert applied < 1e-6 and restored == 0
