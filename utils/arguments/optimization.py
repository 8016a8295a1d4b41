"""Flags for the optimiser, its schedule and the sizes of its steps."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import LARGEST_SEED, Arguments, flag

Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(kw_only=True)
class ScheduleArguments(Arguments):
    """Optimisation that every step shares."""

    num_train_epochs: int = flag(1, "passes over the training data", at_least=1, resume="free")
    max_steps: int = flag(
        0, "stop after this many optimiser steps (step 3: rollouts); 0 = no limit", at_least=0, resume="free"
    )
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimiser step", at_least=1, resume="regroup")
    max_tokens_per_batch: int = flag(
        0,
        "tokens of a micro-batch, at most: rows of an optimiser step are regrouped by length to fit, which "
        "changes memory and speed but not the result; 0 = micro-batches of the given number of rows",
        at_least=0,
    )
    lr_scheduler_type: Scheduler = flag("cosine", "shape of the learning rate over the run")
    num_warmup_steps: int = flag(0, "optimiser steps over which the learning rate rises from 0", at_least=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 = no clipping", at_least=0)
    adam_beta1: float = flag(0.9, "Adam's decay of the mean gradient", at_least=0, below=1)
    adam_beta2: float = flag(0.95, "Adam's decay of the mean squared gradient", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "Adam's epsilon", above=0)
    seed: int = flag(1234, "seed of the data order, sampling and new weights", at_least=0, at_most=LARGEST_SEED)


@dataclass(kw_only=True)
class OptimizationArguments(ScheduleArguments):
    """Optimisation."""

    per_device_train_batch_size: int = flag(
        16,
        "rows per process and micro-batch",
        at_least=1,
        resume="regroup",
        rows_with=["gradient_accumulation_steps"],
    )
    per_device_eval_batch_size: int = flag(16, "rows per process and evaluation batch", at_least=1)
    learning_rate: float = flag(1e-3, "peak rate; use 1e-5 to 2e-5 for full fine-tuning of a LLaMA", above=0)
    weight_decay: float = flag(0.0, "decoupled weight decay of the matrices (norms and biases have none)", at_least=0)


@dataclass(kw_only=True)
class PpoOptimizationArguments(ScheduleArguments):
    """Optimisation."""

    per_device_training_batch_size: int = flag(
        16,
        "sequences per process and PPO micro-batch",
        at_least=1,
        aliases=["per_device_mini_train_batch_size"],
        resume="regroup",
        rows_with=["gradient_accumulation_steps"],
    )
    ppo_epochs: int = flag(1, "passes over a rollout", at_least=1)
    actor_learning_rate: float = flag(9.65e-6, "peak rate of the actor", above=0)
    critic_learning_rate: float = flag(5e-6, "peak rate of the critic", above=0)
    actor_weight_decay: float = flag(0.0, "decoupled weight decay of the actor's matrices", at_least=0)
    critic_weight_decay: float = flag(0.0, "decoupled weight decay of the critic's matrices", at_least=0)
    num_warmup_steps: int = flag(100, "optimiser steps over which the learning rates rise from 0", at_least=0)
    critic_warmup_steps: int = flag(0, "rollouts at the beginning from which only the critic learns", at_least=0)
