"""`--dry_run`: what the run would need, printed before any weights are read."""

import math
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from utils import distributed
from utils.errors import DoesNotFit
from utils.preflight.advice import advise
from utils.preflight.estimate import estimate
from utils.preflight.machine import this_machine
from utils.preflight.phases import Machine
from utils.preflight.report import advice_table, fits, gib, memory_table, verdict
from utils.preflight.roles import Subject
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
    return print_report(config, subject, machine)


def print_report(config: Any, subject: Subject, machine: Machine) -> dict[str, float]:
    """Print the tables and counts of `config`, and what to change where it does not fit; return the numbers.

    Raises:
        DoesNotFit: the predicted peak exceeds `machine.memory`.
    """
    estimated = estimate(config, subject, machine)
    distributed.log(memory_table(estimated, machine))
    if estimated.host:
        distributed.log(f"--offload puts {gib(estimated.host)} GiB per process into the host's memory")
    distributed.log(f"tokens per optimiser step: {estimated.tokens_per_step} at most, over all processes")
    steps = None if subject.rows.count is None else optimiser_steps(config, subject, machine.world_size)
    if steps is None:
        distributed.log("optimiser steps: not known without the number of rows (--rows)")
    else:
        each = " of the actor and as many of the critic" if subject.step == 3 else ""
        distributed.log(f"optimiser steps: {steps}{each}, on {subject.rows.count} training rows")
    distributed.log(verdict(estimated, machine))
    numbers = {"predicted_peak_bytes": estimated.peak, "tokens_per_step": estimated.tokens_per_step}
    if steps is not None:
        numbers["optimiser_steps"] = steps
    if fits(estimated, machine):
        return numbers
    if advice := advise(config, subject, machine, estimated):
        distributed.log(advice_table(advice, machine))
    raise DoesNotFit(verdict(estimated, machine))


def optimiser_steps(config: Any, subject: Subject, world_size: int) -> int:
    """Optimiser steps of the whole run, as the step's main.py counts them (step 3: of the critic)."""
    rows = subject.rows.count
    if subject.step < 3:
        batches = math.ceil(math.ceil(rows / world_size) / config.per_device_train_batch_size)
        return config.max_steps or math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs
    rollout = config.per_device_generation_batch_size * config.generation_batches
    iterations = config.max_steps or rows // (rollout * world_size) * config.num_train_epochs
    if config.enable_test_mode:
        iterations = min(iterations, config.test_stop_step)
    step = config.per_device_training_batch_size * config.gradient_accumulation_steps
    return iterations * (config.ppo_epochs * rollout // step)
