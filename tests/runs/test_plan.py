"""The plan that each main.py makes of its flags and its rows: lengths, optimiser steps, roles."""

import pytest
from step_scripts import load_step

MODELS = {
    1: {"model_name_or_path": "m"},
    2: {"model_name_or_path": "m"},
    3: {"actor_model_name_or_path": "a", "critic_model_name_or_path": "c"},
}


def plan(step: int, rows: int | None, world_size: int = 1, **flags):
    module = load_step(step)
    config = module.Config(**MODELS[step], **flags)
    return module.plan_of(config, {}, rows, world_size)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("rows", "world_size", "flags", "length"),
    [
        (64, 1, {}, 4),
        (65, 1, {}, 5),  # the last step is a smaller one
        (64, 2, {}, 2),
        (64, 1, {"gradient_accumulation_steps": 3}, 2),
        (64, 1, {"gradient_accumulation_steps": 3, "num_train_epochs": 5}, 10),
        (64, 1, {"max_steps": 3}, 3),
        (None, 1, {"max_steps": 3}, 3),
        (None, 1, {}, None),
    ],
)
def test_supervised_steps(step, rows, world_size, flags, length):
    found = plan(step, rows, world_size, **flags)
    assert found.length == length and found.optimizer_steps == {"model": length}
    assert list(found.roles) == ["model"] and not found.generates


@pytest.mark.parametrize(
    ("rows", "world_size", "flags", "rollouts", "actor", "critic"),
    [
        (64, 1, {}, 4, 4, 4),
        (79, 1, {}, 4, 4, 4),  # prompts that do not fill a rollout are left over
        (64, 2, {}, 2, 2, 2),
        (64, 1, {"generation_batches": 2, "ppo_epochs": 3}, 2, 12, 12),
        (64, 1, {"gradient_accumulation_steps": 2}, 2, 2, 2),  # the rollout grows to an optimiser step
        (64, 1, {"critic_warmup_steps": 3}, 4, 1, 4),
        (64, 1, {"critic_warmup_steps": 9}, 4, 0, 4),
        (64, 1, {"num_train_epochs": 2, "max_steps": 7}, 7, 7, 7),
        (64, 1, {"enable_test_mode": True, "test_stop_step": 2}, 2, 2, 2),
        (None, 1, {}, None, None, None),
    ],
)
def test_ppo(rows, world_size, flags, rollouts, actor, critic):
    found = plan(3, rows, world_size, **flags)
    assert found.length == rollouts and found.optimizer_steps == {"actor": actor, "critic": critic}
    assert list(found.roles) == ["actor", "critic", "reference", "reward"] and found.generates


def test_ppo_with_adapters_alone_has_no_reference_of_its_own():
    found = plan(3, 64, actor_lora_dim=4, only_optimize_lora=True)
    assert list(found.roles) == ["actor", "critic", "reward"]
