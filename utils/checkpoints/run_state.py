"""What a checkpoint knows of a run besides tensors, and which flags may differ when it is resumed."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from utils import distributed
from utils.checkpoints.elastic import MAY_DIFFER_TOGETHER, check_sizes
from utils.errors import InputError

STATE_FILE = "state.json"
# Flags that do not change what a step computes, or only how many there are.
MAY_DIFFER = frozenset({
    *("output_dir", "data_output_path", "tensorboard_path", "enable_tensorboard", "verbose", "logging_interval"),
    *("save_interval", "save_total_limit", "resume_from_checkpoint", "keep_best", "save_adapter", "on_nan"),
    *("max_steps", "num_train_epochs", "enable_test_mode", "test_stop_step", "eval_interval"),
    *("stall_timeout", "print_loss", "print_answers", "print_answers_interval", "release_inference_cache"),
    *("local_rank", "deepspeed", "compute_fp32_loss", "preprocessing_num_workers", "num_padding_at_beginning"),
})  # fmt: skip
LIBRARIES = ("torch", "deepspeed", "transformers", "peft")


@dataclasses.dataclass
class RunState:
    """Where a run stands after `step` optimiser steps (step 3: rollouts). A new one is that of a run's beginning."""

    step: int = 0
    seconds: float = 0.0  # of training
    metrics_position: int = 0  # bytes of metrics.jsonl that belong to these steps
    before: dict[str, float] = dataclasses.field(default_factory=dict)  # the evaluation before training
    answers: list[list[str]] = dataclasses.field(default_factory=list)  # prompts and answers before training
    kl_ctl: float | None = None  # of the next rollout
    text_batches: int = 0  # batches of unsupervised text used so far


def describe_run(config: Any, data_keys: list[str]) -> dict[str, Any]:
    """What a resumed run is compared with: flags, data, number of processes, versions of the libraries."""
    return {
        "config": {name: value for name, value in vars(config).items() if name not in MAY_DIFFER},
        "data": data_keys,
        "world_size": distributed.world_size(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def write_state(folder: Path, state: RunState, run: dict[str, Any]) -> Path:
    """Write both to `folder/state.json` and return its path."""
    path = folder / STATE_FILE
    path.write_text(json.dumps({"state": dataclasses.asdict(state), "run": run}, indent=1) + "\n", encoding="utf-8")
    return path


def flag_defaults(config_class: type) -> dict[str, Any]:
    """The value of each flag that has one when it is not given."""
    defaults = {}
    for field in dataclasses.fields(config_class):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def read_state(folder: Path, run: dict[str, Any], defaults: dict[str, Any]) -> tuple[RunState, int]:
    """The state in `folder`, a checkpoint of a run that `run` may continue, and that run's number of processes.

    Args:
        defaults: of flags; where the run was of a version that did not have one, it ran as with its default.

    Raises:
        InputError: it may not: names the first flag that differs, the data, or the rows of a step.
    """
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    saved = content["run"]
    now, then = run["config"], {name: defaults[name] for name in run["config"] if name in defaults} | saved["config"]
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name) and name not in MAY_DIFFER_TOGETHER:
            raise InputError(
                f"--{name} is {now.get(name)}, but {folder} comes from a run with {then.get(name)}: give the same "
                "value, or start anew with another --output_dir"
            )
    check_sizes(now, run["world_size"], then, saved["world_size"], str(folder))
    if saved["data"] != run["data"]:
        raise InputError(
            f"--data_path: the rows are not those that the run of {folder} was trained on (the files, or how they are "
            "prepared, have changed): start anew with another --output_dir"
        )
    for name, version in run["libraries"].items():
        if saved["libraries"].get(name) != version:
            distributed.warn(
                f"{folder} was written with {name} {saved['libraries'].get(name)}, this is {version}: the run "
                "continues, but its numbers may differ in their last digits"
            )
    changed = {name: now[name] for name in sorted(MAY_DIFFER_TOGETHER & now.keys()) if now[name] != then.get(name)}
    if changed or saved["world_size"] != run["world_size"]:
        flags = "".join(f", --{name} {value}" for name, value in changed.items())
        distributed.log(
            f"the run of {saved['world_size']} processes continues with {run['world_size']}{flags}: equal in state "
            "though not in bits"
        )
    known = {field.name for field in dataclasses.fields(RunState)}  # other versions of this package had others
    state = RunState(**{name: value for name, value in content["state"].items() if name in known})
    return state, saved["world_size"]
