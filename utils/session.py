"""A run from its first check to its summary: refusals, the process group, seeds, the log, the end."""

import json
import os
from pathlib import Path

import torch

from utils import distributed
from utils.arguments import meaningless_flags, refuse_unavailable
from utils.checkpoints.best import BEST_FOLDER, forget_score
from utils.checkpoints.folders import checkpoint_steps
from utils.checkpoints.run_state import RunState
from utils.config import save_config
from utils.divergence import DIVERGENCE_FILE
from utils.errors import InputError
from utils.files import atomic_write_text, make_writable
from utils.metrics import MetricsWriter, check_tensorboard
from utils.zero import check_precision

CONFIG_FILE = "run_config.yaml"
SUMMARY_FILE = "summary.json"
MODEL_FLAGS = ("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")


def check_run(config) -> None:
    """What can be refused before any process waits for another: unavailable flags, the dtype, the output folder.

    Raises:
        InputError: one line that names the flag.
    """
    refuse_unavailable(config)
    check_precision(config.dtype)
    if config.output_dir:
        if not config.dry_run:
            _check_nothing_to_resume(config)
            _check_writable(Path(config.output_dir))
        _check_inputs_stay(config)
    if config.enable_tensorboard and not config.dry_run:
        check_tensorboard(config.tensorboard_path, config.output_dir)


def start_run(config) -> None:
    """Join the process group, seed every generator and remark on idle flags once."""
    distributed.init_distributed(verbose=config.verbose, stall_timeout=config.stall_timeout)
    distributed.seed_everything(config.seed)
    for remark in meaningless_flags(config, has_accelerator=torch.accelerator.is_available()):
        distributed.log(f"note: {remark}")


def open_metrics(config, job_name: str, total_steps: int, state: RunState) -> MetricsWriter:
    """The metrics writer that the output flags of `config` ask for; it continues where `state` was saved.

    Nothing can be refused any more: what the folder says of the run, its resolved configuration first, may change.
    A run that begins in its folder removes the report of an earlier run's divergence and the score of its best model.
    """
    if config.output_dir and state.metrics_position == 0 and distributed.is_main():
        (Path(config.output_dir) / DIVERGENCE_FILE).unlink(missing_ok=True)
        forget_score(config.output_dir)
        if (best := Path(config.output_dir) / BEST_FOLDER).exists() and not config.keep_best:
            distributed.log(f"note: {best} is an earlier run's, and stays as it is")
    if config.output_dir and distributed.is_main():
        save_config(config, Path(config.output_dir) / CONFIG_FILE)
    return MetricsWriter(
        config.output_dir,
        job_name=job_name,
        total_steps=total_steps,
        is_main=distributed.is_main(),
        enable_tensorboard=config.enable_tensorboard,
        tensorboard_path=config.tensorboard_path,
        logging_interval=config.logging_interval,
        start_step=state.step,
        position=state.metrics_position,
    )


def save_summary(config, before: dict[str, float], after: dict[str, float], **counts: float) -> dict[str, float]:
    """The numbers of the whole run, also in the output folder's `summary.json` if there is one.

    Args:
        before, after: metrics of the held-out rows; those of `before` get names that end in `_before`.
    """
    summary = {f"{name}_before": value for name, value in before.items()} | after | counts
    if config.output_dir and distributed.is_main():
        atomic_write_text(Path(config.output_dir) / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        distributed.log(f"saved to {config.output_dir}")
    return summary


def _check_nothing_to_resume(config) -> None:
    """A run that forgot to resume would train for nothing, and its checkpoints would mix with those of another run."""
    folder = Path(config.output_dir) / "checkpoints"
    if not config.resume_from_checkpoint and (steps := checkpoint_steps(folder)):
        raise InputError(
            f"--output_dir {config.output_dir} holds a run with checkpoints up to step {steps[0]}: continue it with "
            f"--resume_from_checkpoint auto, or remove {folder} to start anew"
        )


def _check_inputs_stay(config) -> None:
    """A run that wrote over the model it starts from could not be repeated, nor resumed if it has LoRA."""
    names = [name for name in MODEL_FLAGS if getattr(config, name, None)]
    written = {BEST_FOLDER} | ({"actor", "critic", "actor_ema"} if len(names) > 1 else set())
    output_dir = Path(config.output_dir).resolve()
    for name in names:
        path = Path(getattr(config, name)).resolve()
        if path.is_relative_to(output_dir) and written.issuperset(path.relative_to(output_dir).parts):
            raise InputError(
                f"--output_dir {config.output_dir}: the run would write over its --{name} {getattr(config, name)}; "
                "name another folder"
            )


def _check_writable(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"--output_dir {folder}: is a file; name a folder")
    try:
        make_writable(folder)
    except OSError as error:
        raise InputError(
            f"--output_dir {folder}: cannot be written ({os.strerror(error.errno)}); choose another folder"
        ) from error
