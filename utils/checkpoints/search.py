"""Which checkpoint a run continues from: found, and refused if it does not fit, before any model is loaded."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from utils.arguments.steps import StepConfig
from utils.checkpoints.folders import (
    CHECKPOINTS_FOLDER,
    checkpoint_path,
    checkpoint_steps,
    read_manifest,
    wrong_checksum,
)
from utils.checkpoints.run_state import RunState, read_state
from utils.errors import InputError
from utils.parallel import distributed


@dataclasses.dataclass(frozen=True)
class Found:
    """An undamaged checkpoint, of a run that may be continued.

    Attributes:
        processes: how many processes wrote it.
    """

    folder: Path
    state: RunState
    processes: int


def find_checkpoint(config: StepConfig, run: dict[str, Any], total_steps: int) -> Found | None:
    """The checkpoint that --resume_from_checkpoint asks for, the same on every rank; None where a run begins.

    Args:
        run: describes the run with the flags of `config` (`describe_run`).
        total_steps: length of the run.

    Raises:
        InputError: the checkpoint is damaged, or of a run with other flags, other data or more steps.
    """
    wanted = config.resume_from_checkpoint
    if not wanted:
        return None
    root = Path(config.output_dir) / CHECKPOINTS_FOLDER
    folder = _newest_whole(root) if wanted == "auto" else _chosen(Path(wanted))
    if folder is None:
        distributed.log(f"no checkpoint in {root}: starting from the beginning")
        return None
    state, processes = read_state(folder, run, type(config))
    if state.step > total_steps:
        raise InputError(
            f"{folder} is of step {state.step}, but --max_steps or --num_train_epochs end the run after "
            f"{total_steps}: raise them"
        )
    newest = max(checkpoint_steps(root), default=0)
    if wanted != "auto" and newest > state.step:
        raise InputError(
            f"--resume_from_checkpoint {folder}: {checkpoint_path(root, newest)} is later, and would be "
            "mistaken for this run's: remove it, or name another --output_dir"
        )
    if folder.resolve().parent != root.resolve():
        state.metrics_position = 0  # the metrics in --output_dir are not that run's
    return Found(folder, state, processes)


def check_shared(output_dir: Path) -> None:
    """Refuse a folder that the ranks do not share: a checkpoint is made of files from all of them.

    Raises:
        InputError: on every rank; a process does not see what rank 0 writes.
    """
    if distributed.world_size() == 1:
        return
    number = int(distributed.all_reduce_scalar(time.time_ns() // 1000 if distributed.is_main() else 0, "max"))
    probe, problem = output_dir / f".probe-{number}", None  # a new name, which no file system can have cached
    if distributed.is_main():
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            problem = f"--output_dir {output_dir}: cannot be written ({error}); choose another folder"
    problem = distributed.first_problem(problem)
    if not problem and not probe.exists():
        problem = (
            f"--output_dir {output_dir}: process {distributed.rank()} does not see the files that process 0 writes "
            "there; checkpoints of several machines need a folder that all of them share"
        )
    problem = distributed.first_problem(problem)
    if distributed.is_main():
        probe.unlink(missing_ok=True)
    if problem:
        raise InputError(problem)


def _newest_whole(root: Path) -> Path | None:
    """The newest checkpoint without damage, the same on every rank; None if there are none at all."""
    steps = checkpoint_steps(root) if distributed.is_main() else []
    count = int(distributed.all_reduce_scalar(len(steps), "max"))
    for index in range(count):
        folder = checkpoint_path(root, int(distributed.all_reduce_scalar(steps[index] if steps else 0, "max")))
        damage = _find_damage(folder)
        if not damage:
            return folder
        distributed.warn(f"{folder} is damaged, trying the one before: {damage}")
    if count:
        raise InputError(
            f"--resume_from_checkpoint auto: no checkpoint in {root} is undamaged; remove that folder to start "
            "from the beginning"
        )
    return None


def _chosen(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"--resume_from_checkpoint {folder}: no such folder")
    if damage := _find_damage(folder):
        raise InputError(f"--resume_from_checkpoint {folder} is damaged: {damage}")
    return folder


def _find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, the same on every rank; None if it is undamaged. The ranks share the reading."""
    records = read_manifest(folder)
    if isinstance(records, str):
        damage = records
    else:
        damage = wrong_checksum(folder, records, list(records)[distributed.rank() :: distributed.world_size()])
    return distributed.first_problem(damage)
