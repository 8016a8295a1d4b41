"""Flags for the output of a run, and for stopping and resuming it."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.adapters import WITH_LORA
from utils.arguments.base import Arguments, flag
from utils.errors import InputError


@dataclass(kw_only=True)
class OutputArguments(Arguments):
    """Output: what a run writes and shows."""

    output_dir: str | None = flag(
        None, "folder for the model, tokenizer, metrics and curves; if omitted, nothing is saved", resume="free"
    )
    dry_run: bool = flag(
        False,
        "report how much memory each process needs, how many tokens and optimiser steps there are, and what to change "
        "if memory does not suffice; then stop, before weights are read. Nothing is written to --output_dir",
    )
    save_adapter: bool = flag(
        False,
        "with LoRA, save the adapter as well, beside the merged weights",
        resume="free",
        idle_unless=WITH_LORA,
    )
    enable_tensorboard: bool = flag(False, "write TensorBoard event files", resume="free")
    tensorboard_path: str = flag(
        "",
        "folder of the TensorBoard files; if omitted, a folder inside --output_dir",
        resume="free",
        idle_unless="enable_tensorboard",
    )
    logging_interval: int = flag(1, "optimiser steps between two lines of metrics", at_least=1, resume="free")
    verbose: bool = flag(False, "do not silence DeepSpeed and the other libraries", resume="free")

    def check(self) -> None:
        if self.enable_tensorboard and not (self.tensorboard_path or self.output_dir):
            raise InputError("--enable_tensorboard needs a folder: give --tensorboard_path or --output_dir")
        if self.output_dir == "":
            raise InputError("--output_dir is empty: name a folder, or leave the flag out to save nothing")


@dataclass(kw_only=True)
class CheckpointArguments(Arguments):
    """Stopping and resuming."""

    save_interval: int = flag(
        0,
        "optimiser steps (step 3: rollouts) between checkpoints, from which a run resumes; they go to "
        "--output_dir/checkpoints, with one more at the end and one when SIGTERM or Ctrl-C stops the run; 0 = none",
        at_least=0,
        resume="free",
    )
    save_total_limit: int = flag(
        2,
        "checkpoints to keep, older ones are removed; two, so that one is left if the newest is damaged; 0 = all",
        at_least=0,
        resume="free",
        idle_unless="save_interval",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "auto: continue from the newest complete checkpoint in --output_dir, or start afresh if there is none; or the "
        "folder of a checkpoint. The flags must be those of the checkpoint's run, except for those that only set how "
        "long to train, when to evaluate and save, and what to show. The number of processes, the ZeRO stages and the "
        "batch sizes may differ if a step keeps its number of rows: the run is then equal in state but not "
        "bit-identical",
        resume="free",
    )
    keep_best: bool = flag(
        False,
        "save the model of the best evaluation so far (perplexity, accuracy, score of held-out prompts) to "
        "--output_dir/best; evaluations happen every --eval_interval and at the end",
        resume="free",
    )
    on_nan: Literal["stop", "skip"] = flag(
        "stop",
        "what to do when a loss or gradient is NaN or infinite: stop the run, or skip that optimiser step and count it "
        "(metric skipped_steps); either way --output_dir/divergence.json names the step and its rows",
        resume="free",
    )
    stall_timeout: float = flag(
        60.0,
        "minutes without progress, neither a step nor a batch of an evaluation, after which a run of several processes "
        "ends with exit code 5 and names the process that the others wait for; must cover the longest loading or "
        "saving of a model; 0 = no watchdog",
        at_least=0,
        resume="free",
    )

    def check(self) -> None:
        for name in ("save_interval", "resume_from_checkpoint", "keep_best"):
            if getattr(self, name) and not self.output_dir:
                raise InputError(f"--{name} needs a folder: give --output_dir")
