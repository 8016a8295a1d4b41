"""Flags that every step has. The blocks of each step build on these."""

from dataclasses import dataclass
from typing import Literal

from utils.arguments.base import Arguments, flag
from utils.errors import InputError

Scheduler = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
ZeroStage = Literal[0, 1, 2, 3]


@dataclass(kw_only=True)
class CorpusArguments(Arguments):
    """Data that every step reads."""

    data_path: list[str] = flag(
        ["Dahoas/rm-static"],
        "local files or folders (jsonl, json, csv, parquet), names of known data sets on the hub; several are blended",
    )
    data_split: str = flag(
        "2,4,4",
        "relative sizes of the disjoint parts of the data for steps 1, 2 and 3: no step trains on another's rows",
    )
    data_output_path: str | None = flag(
        None,
        "cache folder for tokenised data; left out, a folder private to the user (not a shared /tmp/data_files, "
        "which other users of the machine could read or replace)",
    )

    def check(self) -> None:
        weights = self.data_split.split(",")
        try:
            numbers = [float(weight) for weight in weights]
        except ValueError:
            raise InputError(f"--data_split {self.data_split!r}: expected three numbers like 2,4,4") from None
        if len(numbers) != 3 or not all(0 <= number < float("inf") for number in numbers) or not any(numbers):
            raise InputError(f"--data_split {self.data_split!r}: expected three numbers like 2,4,4, not all zero")
        if not self.data_path or not all(self.data_path):
            raise InputError("--data_path is empty: name at least one file, folder or data set")


@dataclass(kw_only=True)
class ScheduleArguments(Arguments):
    """Optimisation that every step shares."""

    num_train_epochs: int = flag(1, "passes over the training data", at_least=1)
    max_steps: int = flag(0, "stop after this many optimiser steps (step 3: rollouts); 0 = no limit", at_least=0)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimiser step", at_least=1)
    max_tokens_per_batch: int = flag(
        0,
        "tokens of a micro-batch, at most: rows of an optimiser step are regrouped by length until each fits, which "
        "changes memory and speed but not the result; 0 = micro-batches of the given number of rows",
        at_least=0,
    )
    lr_scheduler_type: Scheduler = flag("cosine", "shape of the learning rate over the run")
    num_warmup_steps: int = flag(0, "optimiser steps over which the learning rate rises from 0", at_least=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0 = no clipping", at_least=0)
    adam_beta1: float = flag(0.9, "Adam's decay of the mean gradient", at_least=0, below=1)
    adam_beta2: float = flag(0.95, "Adam's decay of the mean squared gradient", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "Adam's epsilon", above=0)
    seed: int = flag(1234, "seed of the data order, sampling and new weights", at_least=0)


@dataclass(kw_only=True)
class MachineArguments(Arguments):
    """System flags that every step shares."""

    dtype: Literal["bf16", "fp16", "fp32"] = flag(
        "bf16",
        "number format of the forward and backward pass; the optimiser keeps fp32 weights. bf16 rather than fp16, "
        "whose loss scale collapses in long RLHF runs; fp16 needs a GPU",
    )
    offload: bool = flag(False, "keep optimiser states (ZeRO-3: and parameters) in CPU memory")
    compute_fp32_loss: bool = flag(False, "accepted for old scripts: losses are always computed in fp32")
    local_rank: int = flag(-1, "set by the launcher", at_least=-1)
    deepspeed: bool = flag(False, "accepted for old scripts: training always runs on DeepSpeed")


@dataclass(kw_only=True)
class AdapterArguments(Arguments):
    """LoRA flags that every step shares."""

    lora_alpha: float = flag(0.0, "LoRA updates are scaled by alpha / dim; 0 = twice the dimension", at_least=0)
    lora_dropout: float = flag(0.0, "dropout in front of the LoRA matrices (not in PPO)", at_least=0, below=1)
    only_optimize_lora: bool = flag(
        False, "freeze everything but the LoRA matrices; a reward model's or critic's scalar head trains nevertheless"
    )


@dataclass(kw_only=True)
class OutputArguments(Arguments):
    """Output: what a run writes and shows."""

    output_dir: str | None = flag(
        None, "folder for the model, tokenizer, metrics and curves; left out, nothing is saved"
    )
    dry_run: bool = flag(
        False,
        "say how much memory each process needs, how many tokens and optimiser steps there are, and what to change if "
        "it does not fit; stop before weights are read. Nothing is written to --output_dir",
    )
    save_adapter: bool = flag(False, "with LoRA, save the adapter as well, beside the merged weights")
    enable_tensorboard: bool = flag(False, "write TensorBoard event files")
    tensorboard_path: str = flag("", "folder of the TensorBoard files; left out, a folder inside --output_dir")
    logging_interval: int = flag(1, "optimiser steps between two lines of metrics", at_least=1)
    verbose: bool = flag(False, "let DeepSpeed and the libraries talk")

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
    )
    save_total_limit: int = flag(
        2,
        "checkpoints to keep, older ones are removed: two, so that there is one before a damaged one; 0 = all",
        at_least=0,
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "auto: continue from the newest checkpoint in --output_dir that is whole, or start if there is none; or the "
        "folder of a checkpoint. The flags must be those of the checkpoint's run, but for those that only say how long "
        "to train, when to evaluate and save, and what to show. The number of processes, the ZeRO stages and the batch "
        "sizes may differ if a step keeps its number of rows: the run is then equal in state though not in bits",
    )
    keep_best: bool = flag(
        False,
        "save the model of the best evaluation so far (perplexity, accuracy, score of held-out prompts) to "
        "--output_dir/best; evaluations happen every --eval_interval and at the end",
    )
    on_nan: Literal["stop", "skip"] = flag(
        "stop",
        "what a loss or gradient that is NaN or infinite does: stop the run, or skip that optimiser step and count it "
        "(metric skipped_steps); either way --output_dir/divergence.json tells the step and its rows",
    )

    stall_timeout: float = flag(
        60.0,
        "minutes after which a run of several processes in which nothing moves, neither a step nor a batch of an "
        "evaluation, ends with exit code 5 and names the process that the others wait for; must cover the longest "
        "loading or saving of a model; 0 = no watch",
        at_least=0,
    )

    def check(self) -> None:
        for name in ("save_interval", "resume_from_checkpoint", "keep_best"):
            if getattr(self, name) and not self.output_dir:
                raise InputError(f"--{name} needs a place: give --output_dir")


@dataclass(kw_only=True)
class TokenizerArguments(Arguments):
    """Tokenizer."""

    add_eot_token: bool = flag(False, "add --eot_token to the vocabulary and end every response with it")
    eot_token: str = flag("<|endoftext|>", "text of the token that --add_eot_token adds")

    def check(self) -> None:
        if self.add_eot_token and not self.eot_token:
            raise InputError("--eot_token is empty: name the token that --add_eot_token adds")
