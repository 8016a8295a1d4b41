"""`--dry_run`: what the run would need, printed before any weights are read."""

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from utils.arguments.steps import StepConfig
from utils.data import PackedRows, TokenDataset
from utils.data.batches.sizes import measure_rows
from utils.data.rows.streaming import StreamedRows
from utils.errors import DoesNotFit
from utils.parallel import distributed
from utils.preflight.advice import advise
from utils.preflight.estimate import estimate
from utils.preflight.machine import this_machine
from utils.preflight.phases import Estimate, Machine
from utils.preflight.report import (
    advice_table,
    disk_bytes,
    disk_line,
    fits_machine,
    gathering_line,
    gib,
    host_line,
    memory_table,
    verdict,
)
from utils.preflight.roles import Subject
from utils.preflight.saving import checkpoints_at_once
from utils.runs.plan import Models, Plan, Planner


def dry_run(
    plan_of: Planner,
    config: StepConfig,
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: TokenDataset | PackedRows | StreamedRows,
) -> dict[str, float]:
    """Print the report of a run with the flags of `config` on this machine, and return its numbers.

    Args:
        plan_of: the step's planner. models: the configurations of its models.
        train_rows: the training rows, prepared or streamed.

    Raises:
        DoesNotFit: the predicted peak exceeds what this process has; the report was printed.
    """
    rows = measure_rows(train_rows, config.purpose, config.step_rows, config.answer_limit)
    subject = Subject(plan_of, models, len(tokenizer), rows)
    return print_report(config, subject, this_machine(), disk_free=free_disk(config.output_dir))


def print_report(
    config: StepConfig, subject: Subject, machine: Machine, *, disk_free: float | None = None
) -> dict[str, float]:
    """Print the tables and counts of `config`, and what to change where it does not fit; return the numbers.

    Args:
        disk_free: free bytes at --output_dir, where that is on this machine; too few for the run get a warning.

    Raises:
        DoesNotFit: the predicted peak exceeds `machine.memory`.
    """
    estimated, plan = estimate(config, subject, machine), subject.plan(config, machine)
    distributed.log(memory_table(estimated, machine))
    if line := host_line(estimated.host):
        distributed.log(line)
    if estimated.gathering:
        distributed.log(gathering_line(estimated.gathering))
    most = "at most, if each of its prompts had one pair" if config.pairs == "all" else "at most"
    distributed.log(f"tokens per optimiser step: {estimated.tokens_per_step} {most}, over all processes")
    steps = None if None in plan.optimizer_steps.values() else dict(plan.optimizer_steps)
    if steps is None:
        distributed.log("optimiser steps: not known without the number of rows (--rows)")
    else:
        kind = "prompts" if config.pairs == "all" else "rows"
        each = f" ({', '.join(f'{name} {count}' for name, count in steps.items())})" if len(steps) > 1 else ""
        counted = "" if subject.rows.count is None else f", on {subject.rows.count} training {kind}"
        distributed.log(f"optimiser steps: {max(steps.values())}{each}{counted}")
    numbers = {"predicted_peak_bytes": estimated.peak, "tokens_per_step": estimated.tokens_per_step}
    if steps is not None:
        numbers["optimiser_steps"] = max(steps.values())
    if config.output_dir:
        numbers["disk_bytes"] = _print_disk(plan, estimated, disk_free)
    distributed.log(verdict(estimated, machine))
    if fits_machine(estimated, machine):
        return numbers
    if advice := advise(config, subject, machine, estimated):
        distributed.log(advice_table(advice, machine))
    raise DoesNotFit(verdict(estimated, machine))


def _print_disk(plan: Plan, estimated: Estimate, free: float | None) -> float:
    """Print the space that the run takes at --output_dir, warn where less is `free`, and return it in bytes."""
    config, count = plan.config, checkpoints_at_once(plan.config, plan.length)
    distributed.log(disk_line(estimated.disk, count))
    needed = disk_bytes(estimated.disk, count)
    if free is not None and needed > free:
        flags = "lower --save_total_limit, " if config.save_interval else ""
        distributed.warn(
            f"{gib(free)} GiB are free at --output_dir {config.output_dir}, and the run needs up to {gib(needed)}: "
            f"free disk space, {flags}or choose another folder"
        )
    return needed


def free_disk(folder: str | None) -> float | None:
    """Bytes that are free where `folder` is, or would be created; None without a folder."""
    if not folder:
        return None
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return float(shutil.disk_usage(path).free)
