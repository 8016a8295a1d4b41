"""`--dry_run`: what the run would need, printed before any weights are read."""

import math
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from utils import distributed
from utils.errors import DoesNotFit
from utils.preflight.advice import advise
from utils.preflight.estimate import estimate
from utils.preflight.machine import this_machine
from utils.preflight.phases import Estimate, Machine
from utils.preflight.report import (
    advice_table,
    disk_bytes,
    disk_line,
    fits,
    gathering_line,
    gib,
    host_line,
    memory_table,
    verdict,
)
from utils.preflight.roles import Subject
from utils.preflight.saving import checkpoints_at_once
from utils.preflight.workload import measure_rows


def dry_run(
    config: Any,
    step: int,
    model_configs: dict[str, PreTrainedConfig],
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Any,
) -> dict[str, float]:
    """Print the report of a step's `config` on this machine, and return its numbers.

    Args:
        model_configs: steps 1 and 2: "model"; step 3: "actor" and "critic".
        train_rows: the prepared training rows.

    Raises:
        DoesNotFit: the predicted peak exceeds what this process has; the report was printed.
    """
    size = getattr(config, "per_device_train_batch_size", None) or config.per_device_training_batch_size
    answer = config.max_answer_seq_len if step == 3 else config.max_seq_len
    rows = measure_rows(train_rows, step, size * config.gradient_accumulation_steps, answer)
    machine = this_machine()
    subject = Subject(step, model_configs, len(tokenizer), rows)
    return print_report(config, subject, machine, disk_free=free_disk(config.output_dir))


def print_report(
    config: Any, subject: Subject, machine: Machine, *, disk_free: float | None = None
) -> dict[str, float]:
    """Print the tables and counts of `config`, and what to change where it does not fit; return the numbers.

    Args:
        disk_free: bytes at --output_dir, where that is on this machine; fewer than the run needs get a warning.

    Raises:
        DoesNotFit: the predicted peak exceeds `machine.memory`.
    """
    estimated = estimate(config, subject, machine)
    distributed.log(memory_table(estimated, machine))
    if line := host_line(estimated.host):
        distributed.log(line)
    if estimated.gathering:
        distributed.log(gathering_line(estimated.gathering))
    distributed.log(f"tokens per optimiser step: {estimated.tokens_per_step} at most, over all processes")
    steps = None if subject.rows.count is None else optimiser_steps(config, subject, machine.world_size)
    if steps is None:
        distributed.log("optimiser steps: not known without the number of rows (--rows)")
    else:
        each = " of the actor and as many of the critic" if subject.step == 3 else ""
        distributed.log(f"optimiser steps: {steps}{each}, on {subject.rows.count} training rows")
    numbers = {"predicted_peak_bytes": estimated.peak, "tokens_per_step": estimated.tokens_per_step}
    if steps is not None:
        numbers["optimiser_steps"] = steps
    if config.output_dir:
        numbers["disk_bytes"] = _print_disk(config, subject, machine, estimated, disk_free)
    distributed.log(verdict(estimated, machine))
    if fits(estimated, machine):
        return numbers
    if advice := advise(config, subject, machine, estimated):
        distributed.log(advice_table(advice, machine))
    raise DoesNotFit(verdict(estimated, machine))


def _print_disk(config: Any, subject: Subject, machine: Machine, estimated: Estimate, free: float | None) -> float:
    """Print the space that the run takes at --output_dir, warn where less is `free`, and return it in bytes."""
    known = subject.rows.count is not None
    count = checkpoints_at_once(config, run_length(config, subject, machine.world_size) if known else None)
    distributed.log(disk_line(estimated.disk, count))
    needed = disk_bytes(estimated.disk, count)
    if free is not None and needed > free:
        flags = "lower --save_total_limit or " if config.save_interval else ""
        distributed.warn(
            f"{gib(free)} GiB are free at --output_dir {config.output_dir}, and the run needs up to {gib(needed)}: "
            f"make room, {flags}choose another folder"
        )
    return needed


def free_disk(folder: str | None) -> float | None:
    """Bytes that are free where `folder` is, or would be made; None without a folder."""
    if not folder:
        return None
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return float(shutil.disk_usage(path).free)


def run_length(config: Any, subject: Subject, world_size: int) -> int:
    """Optimiser steps of steps 1 and 2, rollouts of step 3, as the step's main.py counts them."""
    rows = subject.rows.count
    if subject.step < 3:
        batches = math.ceil(math.ceil(rows / world_size) / config.per_device_train_batch_size)
        return config.max_steps or math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs
    rollout = config.per_device_generation_batch_size * config.generation_batches
    rollouts = config.max_steps or rows // (rollout * world_size) * config.num_train_epochs
    return min(rollouts, config.test_stop_step) if config.enable_test_mode else rollouts


def optimiser_steps(config: Any, subject: Subject, world_size: int) -> int:
    """Optimiser steps of the whole run (step 3: of the critic)."""
    length = run_length(config, subject, world_size)
    if subject.step < 3:
        return length
    rollout = config.per_device_generation_batch_size * config.generation_batches
    step = config.per_device_training_batch_size * config.gradient_accumulation_steps
    return length * (config.ppo_epochs * rollout // step)
