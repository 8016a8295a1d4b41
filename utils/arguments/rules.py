"""Flags that parse but cannot have their effect in this run: refused by name, or named in a remark."""

from collections.abc import Iterator
from typing import Any

from utils.arguments.base import Arguments, Flag, flag_defaults, known_flags
from utils.arguments.choices import PREFERENCE_LOSSES
from utils.arguments.steps import DpoConfig, PpoConfig, StepConfig
from utils.errors import InputError


def refuse_unavailable(config: StepConfig) -> None:
    """Raise `InputError` for flags that cannot work; to be called before anything is loaded."""
    for name, known in known_flags(type(config)).items():
        value = getattr(config, name)
        if known.unavailable and value:
            asked = f"--{name}" if value is True else f"--{name} {value}"
            raise InputError(f"{asked} is not available yet; {known.unavailable}")
    if getattr(config, "align_overflow", False) and config.dtype == "fp16":
        raise InputError("--align_overflow with fp16 is not available yet; use --dtype bf16, which does not overflow")
    if isinstance(config, PpoConfig):
        _refuse_uneven_rollout(config)
    _refuse_small_budget(config)
    if config.streaming:
        _refuse_what_needs_all_rows(config)


def _refuse_what_needs_all_rows(config: StepConfig) -> None:
    """What cannot be had of a stream, whose rows are neither counted nor read in another order than their own."""
    if not config.max_steps:
        raise InputError(
            "--streaming needs --max_steps: how many rows a stream has is not known, and so neither is the length of "
            f"the run, over which --lr_scheduler_type {config.lr_scheduler_type} is spread: give --max_steps N"
        )
    if config.deduplicate != "none":
        raise InputError(
            f"--deduplicate {config.deduplicate} compares each row with all others, which --streaming does not have: "
            "leave it out, or leave --streaming out"
        )
    if config.score_columns:
        raise InputError(
            f"--score_column {' '.join(config.score_column)} compares the answers of several rows, which --streaming "
            "does not have together: give rows that hold a pair, or leave --streaming out"
        )
    if config.pairs == "all":
        raise InputError(
            "--pairs all keeps the pairs of a prompt together, whose rows may lie anywhere in a stream: use --pairs "
            "best_worst, or leave --streaming out"
        )
    if config.data_weights and config.undivided_paths:
        raise InputError(
            "--sft_only_data_path has no weight, and in a stream with weights every source needs one: name its files "
            "in --data_path, with a weight, or leave the weights out"
        )
    if isinstance(config, DpoConfig):
        if config.reads_labelled:
            raise InputError(
                "--loss kto compares each row with another one of the whole set, which --streaming does not have: use "
                "--loss kto_pair with pairs, or leave --streaming out"
            )
        if config.needs_reference and config.reference_logprobs == "precompute":
            raise InputError(
                "--reference_logprobs precompute reads all rows before training, which --streaming does not: give "
                "--reference_logprobs live"
            )


def _refuse_small_budget(config: StepConfig) -> None:
    """A micro-batch must hold at least one row: a sequence, or both sequences of a pair."""
    longest, flags = config.longest_row()
    if 0 < config.max_tokens_per_batch < longest:
        raise InputError(
            f"--max_tokens_per_batch {config.max_tokens_per_batch} cannot hold one row of up to {longest} tokens "
            f"({flags}): raise it to {longest} or more"
        )


def _refuse_uneven_rollout(config: PpoConfig) -> None:
    """A rollout must split into whole optimiser steps: gradients of two rollouts, hence of two policies, never mix."""
    rollout, step = config.rollout_rows, config.step_rows
    if rollout % step:
        batches = config.generation_batches
        while batches * config.per_device_generation_batch_size % step:
            batches += 1
        raise InputError(
            f"a rollout of {rollout} sequences per process (--per_device_generation_batch_size x --generation_batches) "
            f"does not split into optimiser steps of {step} (--per_device_training_batch_size x "
            f"--gradient_accumulation_steps): change one of the four, for example --generation_batches {batches}"
        )


def remarks(config: Arguments, *, has_accelerator: bool = True) -> list[str]:
    """One line for each flag that was given but has no effect in this run, or whose value is raised."""
    return [*_idle_flags(config, has_accelerator), *_grown_rollout(config)]


def _grown_rollout(config: Arguments) -> Iterator[str]:
    if isinstance(config, PpoConfig) and config.rollout_rows > config.asked_rollout_rows:
        yield (
            f"--generation_batches {config.generation_batches} is raised to "
            f"{config.rollout_rows // config.per_device_generation_batch_size}: an optimiser step needs "
            f"{config.step_rows} sequences of one policy (--per_device_training_batch_size x "
            "--gradient_accumulation_steps)"
        )


def _idle_flags(config: Arguments, has_accelerator: bool) -> list[str]:
    defaults = flag_defaults(type(config))
    given = (
        (name, known)
        for name, known in known_flags(type(config)).items()
        if name in defaults and getattr(config, name) != defaults[name]
    )
    reasons = ((name, next(_why_idle(config, name, known, has_accelerator), "")) for name, known in given)
    return [f"--{name} has no effect: {reason}" for name, reason in reasons if reason]


def _why_idle(config: Arguments, name: str, known: Flag, has_accelerator: bool) -> Iterator[str]:
    """Why a flag that was given has no effect; yields nothing where it has one."""
    if known.needs_gpu and not has_accelerator:
        yield "without a GPU everything is in CPU memory anyway"
    unmet = [_unmet(config, condition) for condition in known.idle_unless]
    if unmet and all(unmet):
        yield " and ".join(unmet)
    if known.idle:
        yield known.idle
    if isinstance(config, DpoConfig):
        yield from _why_idle_in_loss(config, name)


def _why_idle_in_loss(config: DpoConfig, name: str) -> Iterator[str]:
    """Why none of the losses reads a flag that only some losses read."""
    losses = [PREFERENCE_LOSSES[loss] for loss in config.loss_weights]
    of_some = {used for loss in PREFERENCE_LOSSES.values() for used in loss.uses}
    if name in of_some and not any(name in loss.uses for loss in losses):
        yield f"--loss {' '.join(config.loss)} does not use it"
    if name.startswith(("reference_", "offload_reference")) and not any(loss.needs_reference for loss in losses):
        yield f"--loss {' '.join(config.loss)} has no reference"


def _unmet(config: Arguments, condition: str) -> str:
    """Why a condition does not hold, in words; empty where it does.

    A condition is a flag that must be given, `not` a flag, a flag and its value (`dtype == fp16`, `size > 1`), or
    `*ending`: any flag whose name has that ending.
    """
    if condition.startswith("*"):
        names = [name for name in vars(config) if name.endswith(condition[1:])]
        return "" if any(getattr(config, name) for name in names) else f"no --{' or --'.join(names)} is given"
    if condition.startswith("not "):
        name = condition.removeprefix("not ")
        return f"--{name} is given" if getattr(config, name) else ""
    for sign, holds in (
        ("==", lambda value, wanted: str(value) == wanted),
        (">", lambda value, least: value > int(least)),
    ):
        if f" {sign} " in condition:
            name, _, wanted = condition.partition(f" {sign} ")
            value = getattr(config, name)
            return "" if holds(value, wanted) else f"--{name} is {value}"
    return "" if getattr(config, condition) else _not_given(config, condition)


def _not_given(config: Arguments, name: str) -> str:
    value: Any = getattr(config, name)
    if value is False and flag_defaults(type(config)).get(name) is True:
        return f"--no_{name} is given"
    return (
        f"--{name} is {value}" if isinstance(value, int) and not isinstance(value, bool) else f"--{name} is not given"
    )
