"""A model that trains, in its DeepSpeed engine, as the flags describe it."""

from collections.abc import Callable

import deepspeed
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils import distributed
from utils.models.lora import add_lora
from utils.zero import initialize_engine, parameter_groups, zero_config


def build_engine(
    load_model: Callable[..., nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    config,
    *,
    micro_batch_size: int,
    total_steps: int,
    role: str = "",
    dropout: float | None = None,
    lora_dropout: float = 0.0,
) -> deepspeed.DeepSpeedEngine:
    """Load, adapt with LoRA, and wrap a model; the engine is left in training mode.

    Args:
        load_model: `loading.load_causal_lm` or `loading.load_scalar_model`.
        config: a step's Config. With `role`, flags that exist per role are read by their prefixed name:
            role "actor_" reads `actor_zero_stage`, `actor_learning_rate` and so on.
        micro_batch_size: rows per process and micro-batch.
        total_steps: optimiser steps of the learning-rate schedule.
    """

    def of_role(name: str):
        return getattr(config, role + name)

    if remark := _warmup_remark(config, total_steps):
        distributed.log(f"note: {role.removesuffix('_') or 'model'}: {remark}")
    zero = zero_config(
        of_role("zero_stage"),
        config.dtype,
        micro_batch_size=micro_batch_size,
        max_grad_norm=config.max_grad_norm,
        offload=config.offload,
    )
    model = load_model(
        of_role("model_name_or_path"),
        tokenizer,
        zero,
        dtype=config.dtype,
        dropout=dropout,
        gradient_checkpointing=of_role("gradient_checkpointing"),
        trust_remote_code=config.trust_remote_code,
    )
    add_lora(
        model.model,
        of_role("lora_dim"),
        module_name=of_role("lora_module_name"),
        alpha=config.lora_alpha,
        dropout=lora_dropout,
        only_lora=config.only_optimize_lora,
    )
    groups = parameter_groups(
        model,
        learning_rate=of_role("learning_rate"),
        weight_decay=of_role("weight_decay"),
        lora_learning_rate=of_role("lora_learning_rate"),
    )
    engine = initialize_engine(
        model,
        zero,
        groups=groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        scheduler=config.lr_scheduler_type,
        warmup_steps=config.num_warmup_steps,
        total_steps=total_steps,
    )
    engine.train()
    return engine


def _warmup_remark(config, total_steps: int) -> str:
    """What a user should know of a warm-up that does not do what it is for, empty where it does."""
    steps = config.num_warmup_steps
    if total_steps == 0:
        return "never trains: --critic_warmup_steps covers the whole run"
    if steps and config.lr_scheduler_type == "constant":
        return f"--num_warmup_steps {steps} changes nothing: the schedule is constant, not constant_with_warmup"
    if steps and steps >= total_steps:
        return f"--num_warmup_steps {steps} but {total_steps} optimiser steps: the learning rate never reaches its peak"
    return ""
