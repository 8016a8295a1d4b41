"""A run from its first check to its end: refusals, the process group, seeds, the log, the summary."""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.arguments.rules import refuse_unavailable, remarks
from utils.arguments.run import save_config
from utils.arguments.steps import StepConfig
from utils.checkpoints.folders import CHECKPOINTS_FOLDER, checkpoint_steps
from utils.checkpoints.run_state import LIBRARIES, RunState
from utils.data import TokenDataset
from utils.data.rows.streaming import StreamedRows
from utils.errors import InputError
from utils.files import atomic_write_text, try_writing
from utils.output.metrics import METRICS_FILE, MetricsWriter, check_tensorboard
from utils.parallel import distributed
from utils.parallel.divergence import DIVERGENCE_FILE
from utils.parallel.zero import check_offload, check_precision
from utils.runs.best import BEST_FOLDER, forget_score
from utils.runs.plan import Plan

CONFIG_FILE = "run_config.yaml"
SUMMARY_FILE = "summary.json"
DATA_REPORT_FILE = "data_report.json"
REPOSITORY = Path(__file__).resolve().parents[2]
# Files that a run writes into --output_dir and that a folder of data could hold as well.
WRITTEN = frozenset(
    {
        *(METRICS_FILE, SUMMARY_FILE, CONFIG_FILE, DATA_REPORT_FILE, DIVERGENCE_FILE),
        *("config.json", "generation_config.json", "inspect.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "added_tokens.json"),
    }
)


def check_run(config: StepConfig) -> None:
    """What can be refused before any process waits for another: unavailable flags, a GPU that cannot be used, the
    number format, the output folder.

    Raises:
        InputError: one line that names the flag.
    """
    refuse_unavailable(config)
    distributed.check_driver()
    check_precision(config.dtype)
    if config.offload:
        check_offload()
    if config.output_dir:
        _check_inputs_stay(config)
        check_data_stays(config)
        if not config.dry_run:
            _check_writable(Path(config.output_dir))
            _check_nothing_to_resume(config)
    if config.enable_tensorboard and not config.dry_run:
        check_tensorboard(config.tensorboard_path, config.output_dir)


def start_run(config: StepConfig) -> None:
    """Join the process group, seed every generator and note flags that have no effect or do more than they say."""
    distributed.init_distributed(verbose=config.verbose, stall_timeout=config.stall_timeout)
    distributed.seed_everything(config.seed)
    for remark in remarks(config, has_accelerator=torch.accelerator.is_available()):
        distributed.log(f"note: {remark}")


def log_data(rows: TokenDataset | StreamedRows) -> dict[str, Any]:
    """Log where the training rows come from and what was left out; return what `data_report.json` will say of it."""
    distributed.log(rows.description)
    return rows.report


def open_metrics(plan: Plan, state: RunState, data_report: Mapping[str, Any]) -> MetricsWriter:
    """The metrics writer that the output flags ask for; it continues where `state` was saved.

    Called when nothing can be refused any more, because it changes the output folder: it writes the resolved
    configuration and `data_report.json`, and removes an earlier run's divergence report and best score when the run is
    new to the folder.
    """
    config = plan.config
    if config.output_dir and state.metrics_position == 0 and distributed.is_main():
        (Path(config.output_dir) / DIVERGENCE_FILE).unlink(missing_ok=True)
        forget_score(config.output_dir)
        if (best := Path(config.output_dir) / BEST_FOLDER).exists() and not config.keep_best:
            distributed.log(f"note: {best} is from an earlier run, and stays as it is")
    if config.output_dir and distributed.is_main():
        save_config(config, Path(config.output_dir) / CONFIG_FILE)
        text = json.dumps(data_report, indent=2, ensure_ascii=False) + "\n"
        atomic_write_text(Path(config.output_dir) / DATA_REPORT_FILE, text)
    return MetricsWriter(
        config.output_dir,
        job_name=plan.title,
        total_steps=plan.length,
        is_main=distributed.is_main(),
        enable_tensorboard=config.enable_tensorboard,
        tensorboard_path=config.tensorboard_path,
        logging_interval=config.logging_interval,
        start_step=state.step,
        position=state.metrics_position,
    )


def save_summary(plan: Plan, state: RunState, after: dict[str, float], **counts: float) -> dict[str, float]:
    """The numbers of the whole run; also written to `summary.json` in the output folder, with what produced them.

    Args:
        after: metrics of the held-out rows after training; those before it get names that end in `_before`.
        counts: further numbers.
    """
    numbers = {f"{name}_before": value for name, value in state.before.items()} | after | counts
    numbers["train_seconds"] = state.seconds
    if plan.config.output_dir and distributed.is_main():
        path = Path(plan.config.output_dir) / SUMMARY_FILE
        atomic_write_text(path, json.dumps(numbers | {"run": circumstances(plan)}, indent=2) + "\n")
        distributed.log(f"saved to {plan.config.output_dir}")
    return numbers


def circumstances(plan: Plan) -> dict[str, Any]:
    """What produced the numbers of a run: code, libraries, device, processes, models and the command line."""
    return {
        "title": plan.title,
        "command": shlex.join([sys.executable, *sys.argv]),
        "commit": _commit(),
        "libraries": {"python": sys.version.split()[0]}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": distributed.device_name(),
        "processes": distributed.world_size(),
        "models": {name: role.path for name, role in plan.roles.items()},
        "optimizer_steps": dict(plan.optimizer_steps),
    }


def _commit() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None where git finds none."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _check_nothing_to_resume(config: StepConfig) -> None:
    """A run that forgot to resume would train for nothing, and its checkpoints would mix with those of another run."""
    folder = Path(config.output_dir) / CHECKPOINTS_FOLDER
    if not config.resume_from_checkpoint and (steps := checkpoint_steps(folder)):
        raise InputError(
            f"--output_dir {config.output_dir} holds a run with checkpoints up to step {steps[0]}: continue it with "
            f"--resume_from_checkpoint auto, or remove {folder} to start again"
        )


def _check_inputs_stay(config: StepConfig) -> None:
    """A run that wrote over the model it starts from could not be repeated, nor resumed if it has LoRA."""
    output_dir = Path(config.output_dir).resolve()
    for role in config.roles().values():
        path = Path(role.path).resolve()
        if path.is_relative_to(output_dir) and config.written_folders.issuperset(path.relative_to(output_dir).parts):
            raise InputError(
                f"--output_dir {config.output_dir}: the run would write over its {role.path_flag} {role.path}; "
                "name another folder"
            )


def check_data_stays(config: StepConfig) -> None:
    """A run must not write over its data, nor into a folder of data, which the next run would read with its files."""
    output_dir = Path(config.output_dir).resolve()
    for flag, name in config.named_data():
        path = Path(name).expanduser().resolve()
        if path.is_dir() and output_dir.is_relative_to(path):
            raise InputError(
                f"--output_dir {config.output_dir} lies in the data folder {flag} {name}: what the run writes would be "
                "read as data the next time; name another folder"
            )
        if path.is_file() and path.parent == output_dir and path.name in WRITTEN:
            raise InputError(
                f"--output_dir {config.output_dir}: the run would write over its {flag} {name}; name another folder"
            )


def _check_writable(folder: Path) -> None:
    try:
        if folder.is_file():
            raise InputError(f"--output_dir {folder}: is a file; name a folder")
        if distributed.is_main():  # processes that try this in the same folder would remove it for each other
            try_writing(folder)
    except OSError as error:
        raise InputError(
            f"--output_dir {folder}: cannot be written ({os.strerror(error.errno)}); choose another folder"
        ) from error
