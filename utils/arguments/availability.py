"""Flags that parse but cannot do, here and now, what they say: refused by name, or remarked upon once."""

from typing import Any

from utils.errors import InputError

# name -> the value that asks for nothing, and what to do instead
_UNAVAILABLE = {
    "enable_hybrid_engine": (False, "leave it out: answers are generated on the training weights all the same"),
    "unpin_actor_parameters": (False, "leave it out: generation keeps no second copy of the weights"),
    "release_inference_cache": (False, "leave it out: the generation cache does not outlive a rollout"),
    "inference_tp_size": (1, "leave it out, or shard the actor with --actor_zero_stage 3"),
    "enable_mixed_precision_lora": (False, "leave it out, or shard the frozen weights with --actor_zero_stage 3"),
}


def refuse_unavailable(config: Any) -> None:
    """Raise `InputError` for a flag that asks for what does not exist yet; to be called before anything is loaded."""
    for name, (neutral, advice) in _UNAVAILABLE.items():
        value = getattr(config, name, neutral)
        if value != neutral:
            asked = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(f"{asked} is not available yet; {advice}")
    _refuse_uneven_rollout(config)


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
    given = vars(config)
    remarks = []

    def remark(condition: Any, text: str) -> None:
        if condition:
            remarks.append(text)

    remark(
        given.get("num_padding_at_beginning"),
        "--num_padding_at_beginning changes nothing: where padding is, attention masks tell",
    )
    remark(given.get("compute_fp32_loss"), "--compute_fp32_loss changes nothing: losses are always computed in fp32")
    for name in ("actor_dropout", "critic_dropout"):
        remark(given.get(name), f"--{name} changes nothing: PPO runs without dropout, or its ratios would be noise")
    if not has_accelerator:
        for name in ("offload", "offload_reference_model", "offload_reward_model"):
            remark(given.get(name), f"--{name} changes nothing: without a GPU everything is in CPU memory")
    remark(
        given.get("align_overflow") and given.get("dtype") != "fp16",
        f"--align_overflow changes nothing: {given.get('dtype')} has no loss scale that could overflow",
    )
    remark(
        given.get("test_stop_step") and not given.get("enable_test_mode"),
        "--test_stop_step changes nothing without --enable_test_mode",
    )
    remark(
        given.get("unsupervised_dataset_config_name") and not given.get("unsupervised_dataset_name"),
        "--unsupervised_dataset_config_name changes nothing without --unsupervised_dataset_name",
    )
    for role in ("", "actor_", "critic_"):
        remark(
            given.get(f"{role}lora_module_name") and not given.get(f"{role}lora_dim"),
            f"--{role}lora_module_name changes nothing while --{role}lora_dim is 0",
        )
    lora_dims = [value for name, value in given.items() if name.endswith("lora_dim")]
    remark(given.get("only_optimize_lora") and not any(lora_dims), "--only_optimize_lora changes nothing without LoRA")
    remark(given.get("save_adapter") and not any(lora_dims), "--save_adapter changes nothing without LoRA")
    remark(
        given.get("kl_horizon", 10000) != 10000 and given.get("kl_target") is None,
        "--kl_horizon changes nothing without --kl_target",
    )
    remark(
        given.get("eot_token", "<|endoftext|>") != "<|endoftext|>" and not given.get("add_eot_token"),
        "--eot_token changes nothing without --add_eot_token",
    )
    return remarks
