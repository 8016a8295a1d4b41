"""What to change when a step does not fit: flags, and the predicted peak after each change."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from utils.arguments.roles import RoleFlags
from utils.arguments.rules import refuse_unavailable
from utils.arguments.steps import PpoConfig, StepConfig
from utils.errors import InputError
from utils.preflight.estimate import estimate
from utils.preflight.phases import Estimate, Machine
from utils.preflight.roles import Subject

LORA_DIM = 64
MEANINGFUL = 0.02  # a change that saves less than this share of the peak is not worth a line


@dataclass(frozen=True)
class Change:
    """Flags to give, as on a command line, the values they set, and what they cost.

    Of several changes on one `topic` only one is taken.
    """

    topic: str
    flags: str
    values: dict[str, Any]
    price: str


@dataclass(frozen=True)
class Advice:
    """A change, and the estimate with it."""

    flags: str
    price: str
    after: Estimate


def advise(config: StepConfig, subject: Subject, machine: Machine, now: Estimate) -> list[Advice]:
    """Changes that lower the peak, each by itself, and then several together if none is enough.

    Combined changes are taken in the order of `candidates`: first those that affect only speed, last those that affect
    what is learnt.
    """
    assert machine.memory is not None
    helpful = []
    for change in candidates(config, machine):
        after = _estimate(config, change, subject, machine)
        if after is not None and after.peak < (1 - MEANINGFUL) * now.peak:
            helpful.append(Advice(change.flags, change.price, after))
    if any(advice.after.peak <= machine.memory for advice in helpful):
        return helpful
    together = _together(config, subject, machine, now)
    return [*helpful, together] if together else helpful


def _together(config: StepConfig, subject: Subject, machine: Machine, now: Estimate) -> Advice | None:
    """The best change on each topic, one topic after the other, until the peak fits; None unless several help."""
    taken: list[Change] = []
    after = now
    for topic in dict.fromkeys(change.topic for change in candidates(config, machine)):
        changes = [change for change in candidates(config, machine) if change.topic == topic]
        tried = [(change, _estimate(config, change, subject, machine)) for change in changes]
        tried = [(change, result) for change, result in tried if result is not None]
        best, result = min(tried, key=lambda pair: pair[1].peak, default=(None, after))
        if best is not None and result.peak < (1 - MEANINGFUL) * after.peak:
            config, after = dataclasses.replace(config, **best.values), result
            taken.append(best)
        if after.peak <= machine.memory:
            break
    if len(taken) < 2:
        return None
    return Advice(" ".join(change.flags for change in taken), "all of the above", after)


def _estimate(config: StepConfig, change: Change, subject: Subject, machine: Machine) -> Estimate | None:
    """The estimate after `change`, or None where the flags do not allow it."""
    try:
        changed = dataclasses.replace(config, **change.values)
        refuse_unavailable(changed)
        return estimate(changed, subject, machine)
    except InputError:
        return None


def candidates(config: StepConfig, machine: Machine) -> Iterator[Change]:
    """Changes that might help, the cheapest first."""
    trained = [role for role in config.roles().values() if role.trains]
    if isinstance(config, PpoConfig) and config.enable_hybrid_engine:
        if not config.release_inference_cache:
            yield _set("cache", "allocates the cache again for each rollout", release_inference_cache=True)
        if not config.unpin_actor_parameters:
            yield _set("copies", "copies the weights again for each rollout", unpin_actor_parameters=True)
    yield from _smaller_batches(config)
    unchecked = [f"{role.prefix}gradient_checkpointing" for role in trained if not role.gradient_checkpointing]
    if unchecked:
        yield _set("checkpointing", "about a third more time for training", **dict.fromkeys(unchecked, True))
    if machine.world_size > 1:
        for stage in (1, 2, 3):
            lower = [f"{role.prefix}zero_stage" for role in trained if role.zero_stage < stage]
            if lower:
                price = "more communication" if stage == 3 else "almost none"
                yield _set("stage", price, **dict.fromkeys(lower, stage))
    if machine.on_gpu:
        yield from _offloading(config)
    if config.dtype == "fp32" and machine.on_gpu:
        yield _set("dtype", "16-bit activations", dtype="bf16")
    yield from _adapters(config, trained)
    if isinstance(config, PpoConfig) and config.per_device_generation_batch_size % 2 == 0:
        yield _set(
            "generation",
            "slower generation",
            per_device_generation_batch_size=config.per_device_generation_batch_size // 2,
            generation_batches=config.generation_batches * 2,
        )


def _offloading(config: StepConfig) -> Iterator[Change]:
    """What could be kept in host memory."""
    for name in ("offload_reference_model", "offload_reward_model"):
        if getattr(config, name, None) is False:
            yield _set(name, "slower scoring", **{name: True})
    if config.offload:
        return
    yield _set("offload", "slower optimiser steps, and host memory", offload=True)
    if isinstance(config, PpoConfig) and not config.offload_optimizer_during_generation:
        price = "moves the optimiser's state for each rollout, and host memory"
        yield _set("optimiser", price, offload_optimizer_during_generation=True)


def _adapters(config: StepConfig, trained: list[RoleFlags]) -> Iterator[Change]:
    without = [f"{role.prefix}lora_dim" for role in trained if not role.lora_dim]
    if without or not config.only_optimize_lora:
        price = "trains adapters only; needs a higher learning rate"
        yield _set("lora", price, only_optimize_lora=True, **dict.fromkeys(without, LORA_DIM))


def _smaller_batches(config: StepConfig) -> Iterator[Change]:
    """The same rows per optimiser step in more micro-batches, which changes neither the data order nor the result."""
    size, steps = config.micro_batch_rows, config.gradient_accumulation_steps
    row, _ = config.longest_row()
    for divisor in (divisor for divisor in (2, 4, 8, 16) if size % divisor == 0):
        values = {config.micro_batch_flag: size // divisor, "gradient_accumulation_steps": steps * divisor}
        yield _set("micro-batch", "smaller matrix products", **values)
    if not config.max_tokens_per_batch or config.max_tokens_per_batch > row:
        yield _set("micro-batch", "smaller matrix products", max_tokens_per_batch=row)
    if getattr(config, "per_device_eval_batch_size", 1) > 1:
        yield _set("evaluation", "slower evaluation", per_device_eval_batch_size=1)


def _set(topic: str, price: str, **values: Any) -> Change:
    flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())
    return Change(topic, flags, values, price)
