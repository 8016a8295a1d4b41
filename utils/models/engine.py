"""Models in their DeepSpeed engines, as the flags describe them: those that train, and frozen ones."""

import functools

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from utils.arguments.roles import RoleFlags
from utils.arguments.steps import StepConfig
from utils.models.causal_lm import find_own_logits
from utils.models.loading import load_causal_lm, load_scalar_model
from utils.models.lora import add_lora
from utils.models.scalar_head import hidden_size_of
from utils.parallel import distributed
from utils.parallel.zero import Engine, initialize_engine, parameter_groups, zero_config


def build_engine(
    role: RoleFlags,
    tokenizer: PreTrainedTokenizerBase,
    config: StepConfig,
    *,
    total_steps: int,
) -> Engine:
    """Load, adapt with LoRA, and wrap a model that trains; the engine is left in training mode.

    Args:
        total_steps: optimiser steps of the learning-rate schedule.
    """
    if remark := _warmup_remark(config, total_steps):
        distributed.log(f"note: {role.name}: {remark}")
    zero = zero_config(
        role.zero_stage,
        config.dtype,
        micro_batch_size=config.micro_batch_rows,
        max_grad_norm=config.max_grad_norm,
        offload=role.offload,
    )
    model = _load(role, tokenizer, zero, config)
    add_lora(
        model.model,
        role.lora_dim,
        module_name=role.lora_module_name,
        alpha=config.lora_alpha,
        dropout=role.lora_dropout,
        only_lora=role.only_optimize_lora,
    )
    groups = parameter_groups(
        model,
        learning_rate=role.learning_rate,
        weight_decay=role.weight_decay,
        lora_learning_rate=role.lora_learning_rate,
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
    _look_at_logits(engine, role)
    if role.kind == "scalar" and (width := hidden_size_of(model.model.config)):
        distributed.log(
            f"note: {role.name}: its head has a hidden layer of {width}: this project opens the saved folder "
            "(`load_scalar_model`), transformers does not"
        )
    return engine


def build_frozen_engine(role: RoleFlags, tokenizer: PreTrainedTokenizerBase, config: StepConfig) -> Engine:
    """Load and wrap a frozen model; the engine is left in evaluation mode."""
    offload = role.offload and torch.accelerator.is_available()
    stage = 3 if offload else role.zero_stage  # parameters can only be offloaded at stage 3
    zero = zero_config(stage, config.dtype, offload=offload, trainable=False)
    engine = initialize_engine(_load(role, tokenizer, zero, config), zero)
    _look_at_logits(engine, role)
    return engine


def _look_at_logits(engine: Engine, role: RoleFlags) -> None:
    if role.kind == "causal_lm" and find_own_logits(engine.module):
        distributed.log(
            f"note: {role.name}: {engine.module.model.config.model_type} scales or clips its logits, so they are "
            "computed in full: more memory, the same result"
        )


def _load(role: RoleFlags, tokenizer: PreTrainedTokenizerBase, zero: dict, config: StepConfig) -> nn.Module:
    distributed.log(f"loading the {role.name} ...")
    scalar = functools.partial(
        load_scalar_model,
        new_head=role.new_head,
        head_hidden_size=role.head_hidden_size,
        head_dropout=role.head_dropout,
    )
    load = scalar if role.kind == "scalar" else load_causal_lm
    return load(
        role.path,
        tokenizer,
        zero,
        dtype=config.dtype,
        dropout=role.dropout,
        gradient_checkpointing=role.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
        flag=role.path_flag,
    )


def _warmup_remark(config: StepConfig, total_steps: int) -> str:
    """A remark where the model never trains, or its warm-up has no effect or never ends; empty otherwise."""
    steps = config.num_warmup_steps
    if total_steps == 0:
        return "never trains: --critic_warmup_steps covers the whole run"
    if steps and config.lr_scheduler_type == "constant":
        return f"--num_warmup_steps {steps} has no effect: the schedule is constant, not constant_with_warmup"
    if steps and steps >= total_steps:
        return f"--num_warmup_steps {steps} but {total_steps} optimiser steps: the learning rate never reaches its peak"
    return ""
