"""Flags for what a run leaves behind, and for stopping and resuming it."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.adapters import WITH_LORA
from utils.arguments.base import Arguments, flag
from utils.errors import InputError


@dataclass(kw_only=True)
class OutputArguments(Arguments):
    """Output: what a run writes and shows."""

    output_dir: str | None = flag(
        None, "folder for the model, tokenizer, metrics and curves; left out, nothing is saved", resume="free"
    )
    dry_run: bool = flag(
        False,
        "say how much memory each process needs, how many tokens and optimiser steps there are, and what to change if "
        "it does not fit; stop before weights are read. Nothing is written to --output_dir",
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
        "folder of the TensorBoard files; left out, a folder inside --output_dir",
        resume="free",
        idle_unless="enable_tensorboard",
    )
    logging_interval: int = flag(1, "optimiser steps between two lines of metrics", at_least=1, resume="free")
    verbose: bool = flag(False, "let DeepSpeed and the libraries print what they like", resume="free")

    def check(self) -> None:
        if self.enable_tensorboard and not (self.tensorboard_path or self.output_dir):
            raise InputError("--enable_tensorboard needs a place: give --tensorboard_path or --output_dir")
        if self.output_dir == "":
            raise InputError("--output_dir is empty: name a folder, or leave the flag out to save nothing")


@dataclass(kw_only=True)
class CheckpointArguments(Arguments):
    """Stopping and resuming."""

    save_interval: int = flag(
        0,
        "optimiser steps (step 3: rollouts) between checkpoints, which a run resumes from; they go to "
        "--output_dir/checkpoints, one more at the end and one when SIGTERM or Ctrl-C stops the run; 0 = none",
        at_least=0,
        resume="free",
    )
    save_total_limit: int = flag(
        2,
        "checkpoints to keep, older ones are removed: two, so that there is one before a damaged one; 0 = all",
        at_least=0,
        resume="free",
        idle_unless="save_interval",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "auto: continue from the newest checkpoint in --output_dir that is whole, or start if there is none; or the "
        "folder of a checkpoint. The flags must be those of the checkpoint's run, but for those that only say how long "
        "to train, when to evaluate and save, and what to show. The number of processes, the ZeRO stages and the batch "
        "sizes may differ if a step keeps its number of rows: the run is then equal in state though not in bits",
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
        "what a loss or gradient that is NaN or infinite does: stop the run, or skip that optimiser step and count it "
        "(metric skipped_steps); either way --output_dir/divergence.json names the step and its rows",
        resume="free",
    )
    stall_timeout: float = flag(
        60.0,
        "minutes after which a run of several processes in which nothing moves, neither a step nor a batch of an "
        "evaluation, ends with exit code 5 and names the process that the others wait for; must cover the longest "
        "loading or saving of a model; 0 = no watch",
        at_least=0,
        resume="free",
    )

    def check(self) -> None:
        for name in ("save_interval", "resume_from_checkpoint", "keep_best"):
            if getattr(self, name) and not self.output_dir:
                raise InputError(f"--{name} needs a place: give --output_dir")
