"""A complete tiny PPO: models on disk, a Config, an engine, and prompts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import save_causal_lm, save_reward_model

from utils.arguments import (
    CheckpointArguments,
    OutputArguments,
    PpoArguments,
    PpoOptimizationArguments,
    PromptArguments,
    RlhfLoraArguments,
    RlhfModelArguments,
    RlhfSystemArguments,
    RolloutArguments,
    TokenizerArguments,
)


@dataclass(kw_only=True)
class Config(
    PromptArguments, RlhfModelArguments, RolloutArguments, PpoOptimizationArguments, PpoArguments,
    RlhfSystemArguments, RlhfLoraArguments, OutputArguments, CheckpointArguments,
    TokenizerArguments,
):  # fmt: skip
    """The flags of step 3."""


def save_models(folder: Path, tokenizer, **changes) -> dict[str, str]:
    """An actor and a reward model whose configs ask for dropout, which PPO must turn off."""
    return {
        "actor_model_name_or_path": str(save_causal_lm(folder / "actor", tokenizer, attention_dropout=0.3, **changes)),
        "critic_model_name_or_path": str(save_reward_model(folder / "reward", tokenizer, attention_dropout=0.3)),
    }


def make_config(paths: dict[str, str], **changes) -> Config:
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
    return Config(**(defaults | paths | changes))


def make_engine(config: Config, tokenizer):
    from utils import distributed
    from utils.rlhf.engine import RlhfEngine

    distributed.init_distributed()
    distributed.seed_everything(0)
    return RlhfEngine(config, tokenizer, actor_steps=100, critic_steps=100)


def make_prompts(config: Config, vocabulary_size: int, *, seed: int = 0) -> list[list[int]]:
    """Random prompts of unequal length, enough for a rollout."""
    generator = torch.Generator().manual_seed(seed)
    count = config.per_device_generation_batch_size * config.generation_batches
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary_size, (length,), generator=generator).tolist() for length in lengths]
