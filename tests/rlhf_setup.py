"""A complete tiny PPO: models on disk, a Config, the roles and the reward, prompts, and a rollout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import save_causal_lm, save_reward_model
from transformers import PreTrainedTokenizerBase

from utils.arguments import PpoConfig

Row = dict[str, Any]


@dataclass
class Setup:
    """What step 3's main.py holds while it trains."""

    config: PpoConfig
    tokenizer: PreTrainedTokenizerBase
    roles: Any
    reward: Any

    @property
    def actor(self):
        """The actor's DeepSpeed engine."""
        return self.roles.actor.engine

    @property
    def hybrid(self):
        return self.roles.hybrid

    @property
    def decoder(self):
        return self.roles.hybrid.decoder

    def modules(self) -> dict[str, torch.nn.Module]:
        """The four models by role; a shared reference is left out."""
        found = {name: engine.module for name, engine in self.roles.trained.items()}
        if self.roles.frozen:
            found["reference"] = self.roles.frozen[0]
        return found | {"reward": self.reward.source.module}


@dataclass
class Sampled:
    """A rollout as step 3 makes it, and its metrics."""

    minibatches: list
    metrics: dict[str, float]

    @property
    def micro_batches(self) -> list:
        """Those of all optimiser steps."""
        return [micro_batch for minibatch in self.minibatches for micro_batch in minibatch]


def save_models(folder: Path, tokenizer, **changes) -> dict[str, str]:
    """An actor and a reward model whose configs ask for dropout, which PPO must turn off."""
    return {
        "actor_model_name_or_path": str(save_causal_lm(folder / "actor", tokenizer, attention_dropout=0.3, **changes)),
        "critic_model_name_or_path": str(save_reward_model(folder / "reward", tokenizer, attention_dropout=0.3)),
    }


def make_config(paths: dict[str, str], **changes) -> PpoConfig:
    defaults = {
        "dtype": "fp32",
        "per_device_generation_batch_size": 4,
        "generation_batches": 2,
        "per_device_training_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_prompt_seq_len": 16,
        "max_answer_seq_len": 10,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "actor_lora_learning_rate": 1e-2,
        "critic_lora_learning_rate": 1e-2,
        "num_warmup_steps": 0,
    }
    return PpoConfig(**(defaults | paths | changes))


def make_plan(config: PpoConfig, *, steps: int = 100):
    """A plan of so many optimiser steps for each model that trains."""
    from utils.models.checks import check_models
    from utils.runs.plan import Plan

    trained = [name for name, role in config.roles().items() if role.trains]
    return Plan(
        title="test",
        config=config,
        models=check_models(config),
        length=steps,
        unit="rollout",
        optimizer_steps=dict.fromkeys(trained, steps),
        generates=True,
    )


def make_setup(config: PpoConfig, tokenizer) -> Setup:
    from utils.parallel import distributed
    from utils.rewards.shaping import build_reward
    from utils.rlhf.layouts import build_roles

    distributed.init_distributed()
    distributed.seed_everything(0)
    return Setup(config, tokenizer, build_roles(make_plan(config), tokenizer), build_reward(config, tokenizer))


def make_prompts(config: PpoConfig, vocabulary_size: int, *, seed: int = 0) -> list[list[int]]:
    """Random prompts of unequal length, enough for a rollout."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (config.rollout_rows,), generator=generator).tolist()
    return [torch.randint(3, vocabulary_size, (length,), generator=generator).tolist() for length in lengths]


def rows_of(prompts: list[list[int]]) -> list[Row]:
    """Prompts as rows of data."""
    return [{"prompt_ids": prompt, "prompt": "", "reference": None, "columns": "{}"} for prompt in prompts]


def rollout(setup: Setup, prompts: list[list[int]], config: PpoConfig | None = None, *, kl_ctl=0.1, seed) -> Sampled:
    """The verbs of step 3 up to the advantages."""
    from utils.generation.micro_batches import plan_batches
    from utils.rlhf.estimators import estimate_advantages, group_numbers
    from utils.rlhf.evaluation import sampling_params
    from utils.rlhf.metrics import rollout_metrics
    from utils.rlhf.scoring import score_tokens

    config, rows = config or setup.config, rows_of(prompts)
    responses = setup.roles.respond(prompts, sampling_params(config), seed=seed)
    batches = plan_batches(prompts, responses, config, pad_id=setup.tokenizer.pad_token_id)
    scores = setup.reward(rows, responses)
    samples = score_tokens(setup.roles, batches, config)
    experience = estimate_advantages(samples, scores, group_numbers(rows), config, kl_ctl=kl_ctl)
    return Sampled(experience, rollout_metrics(experience, setup.reward, responses))
