"""What a checkpoint says about its run beside the tensors, and what a run that resumes it may change."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from utils.arguments.base import Flag, flag_defaults, known_flags
from utils.arguments.steps import StepConfig
from utils.errors import InputError
from utils.parallel import distributed

STATE_FILE = "state.json"
STATE_FORMAT = 2  # of that file; version 0.1 wrote none
LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


@dataclasses.dataclass
class RunState:
    """Where a run stands after `step` optimiser steps (step 3: rollouts); the defaults are those of a new run."""

    step: int = 0
    seconds: float = 0.0  # of training
    metrics_position: int = 0  # bytes of metrics.jsonl that belong to these steps
    before: dict[str, float] = dataclasses.field(default_factory=dict)  # the evaluation before training
    own: dict[str, Any] = dataclasses.field(default_factory=dict)  # further JSON values of one step alone
    stream: dict[str, Any] | None = None  # where a stream of training rows stands; prepared rows follow from `step`


def describe_run(config: StepConfig, data_keys: list[str]) -> dict[str, Any]:
    """What a resumed run must match: flags, data, number of processes, versions of the libraries."""
    known = known_flags(type(config))
    return {
        "format": STATE_FORMAT,
        "purpose": config.purpose,
        "config": {name: value for name, value in vars(config).items() if known[name].resume != "free"},
        "data": data_keys,
        "world_size": distributed.world_size(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def write_state(folder: Path, state: RunState, run: dict[str, Any]) -> Path:
    """Write both to `folder/state.json` and return its path."""
    path = folder / STATE_FILE
    path.write_text(json.dumps({"state": dataclasses.asdict(state), "run": run}, indent=1) + "\n", encoding="utf-8")
    return path


def read_state(folder: Path, run: dict[str, Any], config_class: type[StepConfig]) -> tuple[RunState, int]:
    """The state in `folder`, a checkpoint of a run that `run` may continue, and that run's number of processes.

    Args:
        config_class: of the flags in `run`. Where the checkpoint's run was of a version that did not have one of them,
            it ran as with its default.

    Raises:
        InputError: it may not: names the first flag that differs, the data, the rows of a step, or the version.
    """
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    saved = content["run"]
    if "format" not in saved:
        raise InputError(
            f"{folder} was written by version 0.1 of this project, which identified prepared rows by a hash of its own "
            "source code, so they cannot be compared with this run's: finish that run with that version, or start "
            "again with another --output_dir"
        )
    if saved["format"] != STATE_FORMAT:
        raise InputError(
            f"{folder} was written by another version of this project (format {saved['format']} of {STATE_FILE}, this "
            f"version reads {STATE_FORMAT}): finish that run with that version, or start again with another "
            "--output_dir"
        )
    if saved["purpose"] != run["purpose"]:
        raise InputError(
            f"{folder} is a checkpoint of another step (its rows are for {saved['purpose']!r}, those of this step for "
            f"{run['purpose']!r}): name that step's script, or another --output_dir"
        )
    flags, defaults = known_flags(config_class), flag_defaults(config_class)
    now, then = run["config"], {name: defaults[name] for name in run["config"] if name in defaults} | saved["config"]
    regrouped = sorted(name for name in now if flags[name].resume == "regroup")
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name) and name not in regrouped:
            raise InputError(
                f"--{name} is {now.get(name)}, but {folder} comes from a run with {then.get(name)}: give the same "
                "value, or start again with another --output_dir"
            )
    _check_rows(flags, now, run["world_size"], then, saved["world_size"], str(folder))
    if saved["data"] != run["data"]:
        raise InputError(
            f"--data_path: the rows are not those that the run of {folder} was trained on (the files, or how they are "
            "prepared, have changed): start again with another --output_dir"
        )
    for name, version in run["libraries"].items():
        if saved["libraries"].get(name) != version:
            distributed.warn(
                f"{folder} was written with {name} {saved['libraries'].get(name)}, this is {version}: the run "
                "continues, but its numbers may differ in their last digits"
            )
    changed = {name: now[name] for name in regrouped if now[name] != then.get(name)}
    if changed or saved["world_size"] != run["world_size"]:
        named = "".join(f", --{name} {value}" for name, value in changed.items())
        distributed.log(
            f"the run of {saved['world_size']} processes continues with {run['world_size']}{named}: equal in state "
            "but not bit-identical"
        )
    return RunState(**content["state"]), saved["world_size"]


def _check_rows(
    flags: dict[str, Flag],
    now: dict[str, Any],
    processes: int,
    then: dict[str, Any],
    processes_then: int,
    source: str,
) -> None:
    """Refuse a run whose steps would not have the rows of those of the run that wrote `source`.

    Flags may differ as long as their products with the number of processes do not: then the n-th step has the same
    rows, however they are dealt out.
    """
    groups = [(name, *known.rows_with) for name, known in flags.items() if known.rows_with is not None]
    if now.get("unsupervised_dataset_name"):  # its epochs are made of whole batches
        groups.append(("per_device_training_batch_size",))
    for names in groups:
        rows, before = processes, processes_then
        for name in names:
            rows, before = rows * now[name], before * then[name]
        if rows != before:
            factors = " x ".join(f"--{name} {now[name]}" for name in names)
            were = " x ".join(str(then[name]) for name in names)
            raise InputError(
                f"{factors} x {processes} processes make {rows} rows, but {source} comes from a run with {were} x "
                f"{processes_then} = {before}: choose values with the same product, so that every row comes once"
            )
