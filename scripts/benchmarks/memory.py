"""Is the memory estimate right? Predicted against measured peak memory of real runs of the three steps, on this CPU.

    python -m scripts.benchmarks.memory                     # all configurations, about ten minutes on two idle cores
    python -m scripts.benchmarks.memory --only sft-bf16 ppo-lora

For every configuration a step's main.py is run twice, in separate processes: with `--dry_run`, whose prediction is read
from its output, and for real, three optimiser steps (step 3: rollouts) on random models and data. Measured is the peak
resident memory that the system reports for a process when it has ended (`ru_maxrss`); of two ranks, the larger one.
"""

import json
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from utils.arguments import Arguments, flag, run
from utils.arguments.steps import STEPS
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.output.tables import format_table
from utils.parallel.launcher import environment_of_its_own

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
VOCABULARY = 32_000
SIZES = {"24M": (288, 768, 6, 6, 6), "72M": (576, 1536, 10, 9, 3)}  # hidden, intermediate, layers, heads, kv heads
ROWS = 240
HEADER = ("configuration", "step", "model", "processes", "flags", "predicted", "measured", "ratio")


@dataclass(frozen=True)
class Run:
    """A run to predict and to measure; `length` is the tokens of a row of the data, half of them prompt."""

    step: str  # a name of `utils.arguments.steps.STEPS`
    size: str
    length: int
    flags: str
    processes: int = 1


RUNS = {
    "sft-fp32": Run("step1", "72M", 256, "--dtype fp32 --per_device_train_batch_size 8"),
    "sft-bf16": Run("step1", "72M", 256, "--dtype bf16 --per_device_train_batch_size 8"),
    "sft-zero1-fp32": Run(
        "step1", "72M", 128, "--dtype fp32 --zero_stage 1 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 2",
    ),
    "sft-zero3": Run(
        "step1", "72M", 256, "--dtype bf16 --zero_stage 3 --gradient_checkpointing --per_device_train_batch_size 8"
    ),
    "sft-zero2-small": Run("step1", "24M", 512, "--dtype bf16 --zero_stage 2 --per_device_train_batch_size 8"),
    "sft-long": Run("step1", "24M", 512, "--dtype fp32 --per_device_train_batch_size 12"),
    "sft-lora": Run(
        "step1", "72M", 256, "--dtype fp32 --lora_dim 16 --only_optimize_lora --per_device_train_batch_size 8"
    ),
    "sft-two": Run("step1", "72M", 256, "--dtype bf16 --zero_stage 2 --per_device_train_batch_size 4", processes=2),
    "reward-zero2": Run("step2", "72M", 256, "--dtype fp32 --zero_stage 2 --per_device_train_batch_size 4"),
    "reward-budget": Run(
        "step2", "72M", 256, "--dtype bf16 --per_device_train_batch_size 8 --max_tokens_per_batch 1024"
    ),
    "ppo-bf16": Run(
        "step3", "72M", 256, "--dtype bf16 --per_device_generation_batch_size 16 --per_device_training_batch_size 8"
    ),
    "ppo-lora": Run(
        "step3", "72M", 256, "--dtype fp32 --actor_lora_dim 8 --critic_lora_dim 8 --only_optimize_lora "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 8",
    ),
    "ppo-zero3": Run(
        "step3", "24M", 256, "--dtype bf16 --actor_zero_stage 3 --critic_zero_stage 3 --enable_ema "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 4 --gradient_accumulation_steps 2",
    ),
    "ppo-checkpointing": Run(
        "step3", "24M", 256, "--dtype bf16 --actor_zero_stage 2 --critic_zero_stage 2 --actor_gradient_checkpointing "
        "--critic_gradient_checkpointing --per_device_generation_batch_size 16 --per_device_training_batch_size 16",
    ),
    "ppo-saves": Run(
        "step3", "72M", 128, "--dtype fp32 --actor_zero_stage 1 --critic_zero_stage 1 --enable_ema --save_interval 2 "
        "--keep_best --eval_interval 1 --per_device_generation_batch_size 4 --per_device_training_batch_size 1",
    ),
    "ppo-stream": Run(
        "step3", "24M", 256, "--dtype bf16 --actor_zero_stage 3 --critic_zero_stage 3 --stream_generation_weights on "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 4",
    ),
    "ppo-share": Run(
        "step3", "24M", 256, "--dtype bf16 --actor_zero_stage 3 --critic_zero_stage 3 --inference_tp_size 2 "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 4", processes=2,
    ),
}  # fmt: skip


@dataclass(kw_only=True)
class Config(Arguments):
    """Memory benchmark."""

    only: list[str] = flag([], "names of the configurations to run; default: all")
    output_dir: str = flag(str(REPOSITORY / "output" / "memory"), "folder for models, data and the table")

    def check(self) -> None:
        if unknown := set(self.only) - set(RUNS):
            raise InputError(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(RUNS)}")


def make_models(folder: Path) -> None:
    """Make random language and reward models with a whole-word tokenizer, unless they exist."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    for size, (hidden, intermediate, layers, heads, kv_heads) in SIZES.items():
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1024, num_labels=1,
            pad_token_id=0,
        )  # fmt: skip
        for name, auto_class in (
            ("language", transformers.AutoModelForCausalLM),
            ("reward", transformers.AutoModelForSequenceClassification),
        ):
            path = folder / f"{name}-{size}"
            if not (path / "tokenizer.json").is_file():
                auto_class.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
                tokenizer.save_pretrained(path)


def make_rows(folder: Path, length: int) -> Path:
    """A file of preference rows whose prompts and answers have `length` / 2 words each."""
    path, words = folder / f"rows{length}.jsonl", random.Random(length)
    if not path.is_file():
        rows = (
            {
                name: " " + " ".join(f"w{words.randrange(4, VOCABULARY)}" for _ in range(length // 2))
                for name in ("prompt", "chosen", "rejected")
            }
            for _ in range(ROWS)
        )
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def supervised_flags(run: Run, folder: Path) -> list:
    """Model and lengths of steps 1 and 2."""
    return [
        *("--model_name_or_path", folder / f"language-{run.size}", "--max_seq_len", run.length),
        *("--eval_samples", 8, "--per_device_eval_batch_size", 4),
    ]


def rlhf_flags(run: Run, folder: Path) -> list:
    """Models and lengths of step 3."""
    return [
        *("--actor_model_name_or_path", folder / f"language-{run.size}"),
        *("--critic_model_name_or_path", folder / f"reward-{run.size}"),
        *("--max_prompt_seq_len", run.length // 2, "--max_answer_seq_len", run.length // 4, "--eval_prompts", 8),
    ]


WORK = {"step1": supervised_flags, "step2": supervised_flags, "step3": rlhf_flags}


def command(run: Run, folder: Path) -> list[str]:
    """The command line of `run`, without `--dry_run`."""
    script = REPOSITORY / "training" / STEPS[run.step].folder / "main.py"
    flags = [
        *("--data_path", make_rows(folder, run.length), "--data_split", "1,1,1"),
        *("--data_output_path", folder / "cache", "--output_dir", folder / "out", "--max_steps", 3),
        *WORK[run.step](run, folder),
    ]
    return [sys.executable, str(script), *map(str, flags), *run.flags.split()]


def start(words: list[str], rank: int, run: Run, port: int, log: Path) -> subprocess.Popen:
    """One rank of a run; what it prints goes to `log`."""
    environment = environment_of_its_own() | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run.processes)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(log, "w", encoding="utf-8") as stream:
        return subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)


def peak_bytes(words: list[str], run: Run, log: Path) -> int:
    """Run all ranks and return the largest peak resident memory of any of them.

    Raises:
        InputError: a rank failed; the message names its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [log.with_suffix(f".{rank}.log") for rank in range(run.processes)]
    processes = [start(words, rank, run, port, path) for rank, path in enumerate(logs)]
    peaks = []
    by_id = {process.pid: (process, path) for process, path in zip(processes, logs, strict=True)}
    try:
        for _ in processes:  # in the order in which they end: when one fails, the others wait for it
            number, status, usage = os.wait4(-1, 0)
            process, path = by_id.pop(number)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise InputError(f"a run ended with exit code {process.returncode}: see {path}")
            peaks.append(usage.ru_maxrss * 1024)
    finally:
        for process, _ in by_id.values():
            process.kill()
            process.wait()
    return max(peaks)


def measure(name: str, run: Run, folder: Path) -> tuple[str, ...]:
    """A row of the table."""
    words, log = command(run, folder), folder / name
    shutil.rmtree(folder / "out", ignore_errors=True)  # a step refuses a folder with another run's checkpoints
    peak_bytes([*words, "--dry_run"], run, log)
    printed = log.with_suffix(".0.log").read_text(encoding="utf-8")
    predicted = float(re.search(r"predicted peak: ([\d.]+) GiB", printed)[1])
    measured = peak_bytes(words, run, log) / GIB
    return (
        name, run.step, run.size, str(run.processes), f"rows of {run.length} tokens; {run.flags}",
        f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured:.2f}",
    )  # fmt: skip


def main(config: Config) -> None:
    """Measure, print the table and write it as memory.md."""
    folder = Path(config.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_models(folder)
    rows = []
    for name in config.only or RUNS:
        rows.append(measure(name, RUNS[name], folder))
        print(" ".join(rows[-1]), flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    machine = f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}"
    title = f"peak memory of a process, GiB; {machine}, {versions}, {' '.join(platform.libc_ver())}"
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    atomic_write_text(folder / "memory.md", f"{title}\n\n" + "".join("| " + " | ".join(x) + " |\n" for x in lines))
    print(format_table(title, rows, HEADER))


if __name__ == "__main__":
    run(main, Config)
