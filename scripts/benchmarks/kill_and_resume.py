"""Does a killed run end as if nothing had happened? Kills step 3 again and again, and resumes it each time.

    python -m scripts.benchmarks.kill_and_resume                              # 25 kills, one process
    python -m scripts.benchmarks.kill_and_resume --kills 5 --processes 2 --zero_stage 3

A tiny random world is made, PPO runs on it once without interruption, then once more with kills (SIGKILL): a third of
the kills come while a checkpoint is being written, a third while the program starts or loads one, a third while it
trains. After each kill every folder with the name of a checkpoint must be whole. At the end the weights of both runs
must be equal bit for bit, and so must their metrics except for times. The exit code is 0 only then.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.arguments import Arguments, flag, run
from utils.arguments.steps import STEPS
from utils.checkpoints import folders
from utils.errors import InputError
from utils.output.metrics import read_metrics
from utils.output.tables import format_table
from utils.parallel.launcher import environment_of_its_own
from utils.toy.files import WorldSizes, write_world

REPOSITORY = Path(__file__).resolve().parents[2]
STEP2, STEP3 = (REPOSITORY / "training" / STEPS[name].folder / "main.py" for name in ("step2", "step3"))
MOMENTS = ("saving", "starting", "training")
ITERATIONS_PER_KILL = 2  # a kill waits for at most so many, so that the run does not end before the last kill
SECONDS_FOR_ONE = 600.0  # a run that needs longer for one wait hangs
CLOCKS = ("time", "throughput")


@dataclass(kw_only=True)
class Config(Arguments):
    """Kills."""

    kills: int = flag(25, "how often to kill the run", at_least=1)
    processes: int = flag(1, "processes of the run", at_least=1)
    zero_stage: int = flag(0, "ZeRO stage of actor and critic", at_least=0, at_most=3)
    lora_dim: int = flag(0, "rank of the LoRA matrices of both; 0 = no LoRA", at_least=0)
    seed: int = flag(1, "seed of the world and of the times of kills", at_least=0)
    output_dir: str = flag(str(REPOSITORY / "output" / "kill_and_resume"), "folder for everything; must not exist")

    def check(self) -> None:
        if Path(self.output_dir).exists():
            raise InputError(f"--output_dir {self.output_dir} exists: remove it or name another")


def make_world(config: Config) -> list[str]:
    """A tiny world with a random actor and a reward model, and step 3's flags for it."""
    folder = Path(config.output_dir)
    files = write_world(folder / "world", config.seed, WorldSizes(pretraining=200, sft=200, preference=200, held_out=8))
    shared = ["--dtype", "fp32", "--data_output_path", str(folder / "cache")]
    reward = [sys.executable, str(STEP2), "--model_name_or_path", str(files.random_model), "--max_steps", "1"]
    reward += ["--max_seq_len", "128"]
    reward += ["--data_path", str(files.preference), "--output_dir", str(folder / "reward"), *shared]
    subprocess.run(reward, check=True, env=environment_of_its_own())
    models = ["--actor_model_name_or_path", str(files.random_model), "--critic_model_name_or_path"]
    sizes = ["--per_device_generation_batch_size", "2", "--per_device_training_batch_size", "1"]
    lengths = ["--max_prompt_seq_len", "64", "--max_answer_seq_len", "16", "--eval_prompts", "4"]
    training = ["--kl_target", "1", "--enable_ema", "--actor_learning_rate", "1e-4", "--num_warmup_steps", "2"]
    for role in ("actor", "critic"):
        training += [f"--{role}_zero_stage", str(config.zero_stage), f"--{role}_lora_dim", str(config.lora_dim)]
    data = ["--data_path", str(files.prompts)]
    return [*models, str(folder / "reward"), *data, *sizes, *lengths, *training, *shared]


def start(argv: Sequence[str], output: Path, processes: int) -> subprocess.Popen:
    """Start step 3 in a new session, so that all its processes can be killed together."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(STEP3), *argv, "--output_dir", str(output)]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment_of_its_own())


def finish(argv: Sequence[str], output: Path, processes: int) -> float:
    """Run to the end and return the seconds that it took. Raises SystemExit if the run fails."""
    started = time.monotonic()
    if code := start(argv, output, processes).wait(timeout=SECONDS_FOR_ONE):
        raise SystemExit(f"the run ended with exit code {code}: see {output.with_suffix('.log')}")
    return time.monotonic() - started


def wait_for_moment(process: subprocess.Popen, output: Path, moment: str, chance: random.Random) -> None:
    """Return at a random time of the kind `moment`, or when the process has ended."""
    checkpoints, begun = output / "checkpoints", time.monotonic()
    saved = _newest(checkpoints)
    if moment == "starting":
        seconds = chance.uniform(0.5, 6.0)
        while time.monotonic() - begun < seconds and _newest(checkpoints) == saved:  # a fast start ends earlier
            time.sleep(0.002)
        return
    left = chance.randint(1, ITERATIONS_PER_KILL)
    while process.poll() is None and _newest(checkpoints) < saved + left - (moment == "saving"):
        time.sleep(0.002)
        if time.monotonic() - begun > SECONDS_FOR_ONE:
            raise SystemExit(f"the run hangs: see {output.with_suffix('.log')}")
    while moment == "saving" and process.poll() is None and not list(checkpoints.glob(".checkpoint-*.tmp")):
        time.sleep(0.0005)
    time.sleep(chance.uniform(0.0, 0.03 if moment == "saving" else 0.3))


def check_whole(checkpoints: Path) -> None:
    """Raise SystemExit if a folder with a checkpoint's name is not whole."""
    for step in folders.checkpoint_steps(checkpoints):
        folder = folders.checkpoint_path(checkpoints, step)
        records = folders.read_manifest(folder)
        damage = records if isinstance(records, str) else folders.wrong_checksum(folder, records, records)
        if damage:
            raise SystemExit(f"{folder} is not whole: {damage}")


def kill_and_resume(argv: Sequence[str], folder: Path, *, kills: int, processes: int, seed: int) -> list[tuple]:
    """Run step 3 with the flags `argv` once undisturbed and once with `kills` kills; compare the two.

    Returns:
        For each kill: (number, moment, step of the newest checkpoint, what the kill left half-written).
    Raises:
        SystemExit: a checkpoint was not whole, a run failed, or the two runs differ.
    """
    argv = [*argv, "--save_interval", "1", "--max_steps", str(kills * ITERATIONS_PER_KILL + 2)]
    whole, killed, chance = folder / "whole", folder / "killed", random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    finish(argv, whole, processes)
    argv += ["--resume_from_checkpoint", "auto"]
    rows = []
    for number in range(kills):
        process, moment = start(argv, killed, processes), MOMENTS[number % len(MOMENTS)]
        wait_for_moment(process, killed, moment, chance)
        if process.poll() is not None:
            raise SystemExit(f"the run ended before kill {number + 1}: see {killed.with_suffix('.log')}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        check_whole(killed / "checkpoints")
        left = ", ".join(sorted(path.name for path in (killed / "checkpoints").glob(".*")))
        rows.append((str(number + 1), moment, str(_newest(killed / "checkpoints")), left or "nothing"))
    finish(argv, killed, processes)
    compare(whole, killed)
    return rows


def compare(whole: Path, killed: Path) -> None:
    """Raise SystemExit unless weights and metrics (except for times) of two finished runs are equal."""
    for role in ("actor", "critic", "actor_ema"):
        file = Path(role) / "model.safetensors"
        if (whole / file).exists() and (whole / file).read_bytes() != (killed / file).read_bytes():
            raise SystemExit(f"{file} differs between {whole} and {killed}")
    metrics = [
        [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in read_metrics(path)]
        for path in (whole / "metrics.jsonl", killed / "metrics.jsonl")
    ]
    if metrics[0] != metrics[1]:
        raise SystemExit(f"metrics.jsonl differs between {whole} and {killed}")


def main(config: Config) -> None:
    """Make the world, kill and resume, and print what happened."""
    rows = kill_and_resume(
        make_world(config),
        Path(config.output_dir),
        kills=config.kills,
        processes=config.processes,
        seed=config.seed,
    )
    print(format_table("kills", rows, ("kill", "while", "newest checkpoint", "left half-written")))
    print(f"{config.kills} kills ({dict(Counter(row[1] for row in rows))}): weights and metrics are equal bit for bit")


def _newest(checkpoints: Path) -> int:
    return max(folders.checkpoint_steps(checkpoints), default=0)


if __name__ == "__main__":
    run(main, Config)
