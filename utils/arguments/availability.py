"""Flags that parse but cannot do, here and now, what they say: refused by name, or remarked upon once."""

from collections.abc import Iterator
from typing import Any

from utils.errors import InputError

# name -> the value that asks for nothing, and what to do instead
_UNAVAILABLE = {
    "enable_mixed_precision_lora": (False, "leave it out, or shard the frozen weights with --actor_zero_stage 3"),
}


def refuse_unavailable(config: Any) -> None:
    """Raise `InputError` for a flag that asks for what does not exist yet; to be called before anything is loaded."""
    for name, (neutral, advice) in _UNAVAILABLE.items():
        value = getattr(config, name, neutral)
        if value != neutral:
            asked = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(f"{asked} is not available yet; {advice}")
    if getattr(config, "align_overflow", False) and config.dtype == "fp16":
        raise InputError("--align_overflow with fp16 is not available yet; use --dtype bf16, which does not overflow")
    _refuse_uneven_rollout(config)
    _refuse_small_budget(config)


def _refuse_small_budget(config: Any) -> None:
    """A micro-batch must hold one row at least: a sequence, or both sequences of a pair."""
    if hasattr(config, "max_seq_len"):
        pair = hasattr(config, "reward_loss")
        longest, flags = config.max_seq_len * (1 + pair), f"{'twice ' * pair}--max_seq_len"
    else:
        longest, flags = (
            config.max_prompt_seq_len + config.max_answer_seq_len,
            ("--max_prompt_seq_len + --max_answer_seq_len"),
        )
    if 0 < config.max_tokens_per_batch < longest:
        raise InputError(
            f"--max_tokens_per_batch {config.max_tokens_per_batch} cannot hold one row of up to {longest} tokens "
            f"({flags}): raise it to {longest} or more"
        )


def _refuse_uneven_rollout(config: Any) -> None:
    """A rollout must split into whole optimiser steps: gradients of two rollouts, hence of two policies, never mix."""
    if not hasattr(config, "per_device_generation_batch_size"):
        return
    rollout = config.per_device_generation_batch_size * config.generation_batches
    step = config.per_device_training_batch_size * config.gradient_accumulation_steps
    if rollout % step:
        raise InputError(
            f"a rollout of {rollout} sequences per process (--per_device_generation_batch_size x --generation_batches) "
            f"does not split into optimiser steps of {step} (--per_device_training_batch_size x "
            f"--gradient_accumulation_steps): change one of the four, for example "
            f"--generation_batches {_next_batches(config, step)}"
        )


def _next_batches(config: Any, step: int) -> int:
    batches = config.generation_batches
    while batches * config.per_device_generation_batch_size % step:
        batches += 1
    return batches


def meaningless_flags(config: Any, *, has_accelerator: bool = True) -> list[str]:
    """One line for each flag that was given but changes nothing in this run, for the log."""
    return [f"--{name} changes nothing: {reason}" for name, reason in _idle_flags(vars(config), has_accelerator)]


def _idle_flags(given: dict[str, Any], has_accelerator: bool) -> Iterator[tuple[str, str]]:
    """Names of given flags, and why they do nothing. `given` maps flag names to values; no step has all of them."""
    if given.get("num_padding_at_beginning"):
        yield "num_padding_at_beginning", "attention masks tell where padding is"
    if given.get("compute_fp32_loss"):
        yield "compute_fp32_loss", "losses are always computed in fp32"
    for name in ("actor_dropout", "critic_dropout"):
        if given.get(name):
            yield name, "PPO runs without dropout, which would make noise of its ratios"
    for name in ("offload", "offload_reference_model", "offload_reward_model"):
        if given.get(name) and not has_accelerator:
            yield name, "without a GPU everything is in CPU memory anyway"
    if given.get("align_overflow"):
        yield "align_overflow", f"{given['dtype']} has no loss scale that could overflow"
    if given.get("preprocessing_num_workers"):
        yield "preprocessing_num_workers", "one process per machine tokenises, once, and the cache keeps the result"
    if given.get("test_stop_step") and not given["enable_test_mode"]:
        yield "test_stop_step", "--enable_test_mode is not given"
    if given.get("unsupervised_dataset_config_name") and not given["unsupervised_dataset_name"]:
        yield "unsupervised_dataset_config_name", "--unsupervised_dataset_name is not given"
    if given.get("kl_horizon", 10000) != 10000 and given["kl_target"] is None:
        yield "kl_horizon", "--kl_target is not given"
    if given.get("eot_token", "<|endoftext|>") != "<|endoftext|>" and not given["add_eot_token"]:
        yield "eot_token", "--add_eot_token is not given"
    if "enable_hybrid_engine" in given:
        yield from _idle_generation_flags(given, has_accelerator)
    yield from _idle_lora_flags(given)


def _idle_lora_flags(given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for role in ("", "actor_", "critic_"):
        if given.get(f"{role}lora_module_name") and not given[f"{role}lora_dim"]:
            yield f"{role}lora_module_name", f"--{role}lora_dim is 0"
    if not any(value for name, value in given.items() if name.endswith("lora_dim")):
        for name in ("only_optimize_lora", "save_adapter", "lora_alpha", "lora_dropout"):
            if given.get(name):
                yield name, "no model has LoRA"
    elif given.get("lora_dropout") and "actor_lora_dim" in given:
        yield "lora_dropout", "PPO runs without dropout, which would make noise of its ratios"


def _idle_generation_flags(given: dict[str, Any], has_accelerator: bool) -> Iterator[tuple[str, str]]:
    if given["tp_gather_partition_size"] != 8 and given["inference_tp_size"] == 1:
        yield "tp_gather_partition_size", "--inference_tp_size is 1"
    if given["offload_optimizer_during_generation"]:
        if not has_accelerator:
            yield "offload_optimizer_during_generation", "without a GPU everything is in CPU memory anyway"
        elif given["offload"]:
            yield "offload_optimizer_during_generation", "--offload keeps it there all the time"
    if given["stream_generation_weights"] != "auto" and given["actor_zero_stage"] != 3:
        yield "stream_generation_weights", "--actor_zero_stage is not 3"
    if given["lora_generation"] != "fused" and not given["actor_lora_dim"]:
        yield "lora_generation", "--actor_lora_dim is 0"
    for name in ("unpin_actor_parameters", "release_inference_cache"):
        if given[name] and not given["enable_hybrid_engine"]:
            yield name, "transformers generates, which keeps neither"
