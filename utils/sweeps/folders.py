"""What earlier sweeps left in the output folder: finished runs that still belong to the sweep, and runs to continue."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.arguments.base import known_flags
from utils.arguments.run import read_flags
from utils.arguments.steps import StepConfig
from utils.checkpoints.folders import CHECKPOINTS_FOLDER, checkpoint_steps
from utils.errors import InputError
from utils.runs.session import CONFIG_FILE, SUMMARY_FILE
from utils.sweeps.grid import Run, Sweep, relevant_flags


@dataclass(frozen=True)
class Place:
    """Where a run is, or will be.

    Attributes:
        summary: the numbers of a finished run; None for one that has to run.
        resumes: whether the run saves checkpoints, and so continues from what an interruption left.
    """

    run: Run
    folder: Path
    summary: dict[str, float] | None
    resumes: bool

    @property
    def log(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.log"


def find_places(sweep: Sweep, output_dir: Path, processes: int) -> list[Place]:
    """The place of each run of the sweep, in its order.

    A finished run is found by its flags, whatever its folder is called: the names change when a sweep gets another
    flag. Runs that do not belong to the sweep stay untouched.

    Args:
        processes: that a run is started with; one on another number is a different run.
    Raises:
        InputError: the folder of a run holds another run.
    """
    config_class = type(sweep.runs[0].config)
    finished = {}
    for path in sorted(output_dir.glob(f"*/{SUMMARY_FILE}")):
        config, summary = _config_in(path.parent, config_class), read_summary(path.parent)
        if config is not None and summary is not None and _processes_of(summary) == processes:
            finished[path.parent] = relevant_flags(config)
    places = []
    for run in sweep.runs:
        flags = relevant_flags(run.config)
        same = [folder for folder, others in finished.items() if others == flags]
        folder = same[0] if same else output_dir / run.name
        if not same:
            _refuse_another_run(run, folder, processes)
        summary = numbers_of(read_summary(folder)) if same else None
        resumes = bool(run.config.save_interval or checkpoint_steps(folder / CHECKPOINTS_FOLDER))
        places.append(Place(run, folder, summary, resumes))
    return places


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What a finished run wrote about itself; None where there is none."""
    try:
        return json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def numbers_of(summary: dict[str, Any] | None) -> dict[str, float]:
    """The numbers of a summary; NaN where JSON has none."""
    values = {name: math.nan if value is None else value for name, value in (summary or {}).items()}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _processes_of(summary: dict[str, Any]) -> Any:
    run = summary.get("run")
    return run.get("processes") if isinstance(run, dict) else None


def _config_in(folder: Path, config_class: type[StepConfig]) -> StepConfig | None:
    """The flags of the run in a folder; None where it is not a run of this step."""
    try:
        return read_flags(config_class, ["--config", str(folder / CONFIG_FILE)])
    except InputError:
        return None


def _refuse_another_run(run: Run, folder: Path, processes: int) -> None:
    """Runs are long: one with other flags is not written over, and its checkpoints are not continued."""
    summary, steps = read_summary(folder), checkpoint_steps(folder / CHECKPOINTS_FOLDER)
    if summary is None and not steps:
        return
    config = _config_in(folder, type(run.config))
    advice = "name another --output_dir, or remove that folder"
    if config is None:
        raise InputError(f"{folder} holds a run whose {CONFIG_FILE} is not one of this step; {advice}")
    theirs, ours, known = relevant_flags(config), relevant_flags(run.config), known_flags(type(config))
    for name, value in ours.items():
        may_change = summary is None and known[name].resume != "same"  # the step itself says when it may not
        if theirs[name] != value and not may_change:
            raise InputError(f"{folder} holds a run with --{name} {theirs[name]}, and not {value}; {advice}")
    if summary is not None and (number := _processes_of(summary)) != processes:
        raise InputError(f"{folder} holds a run on {number} processes, and not {processes}; {advice}")
