"""Contenders of a comparison, ours and peers. Each repetition is a separate process, measured from outside."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.report import MEMORY, ReportArguments
from utils.arguments import Arguments, flag
from utils.errors import InputError
from utils.output.metrics import METRICS_FILE, read_metrics
from utils.parallel.launcher import environment_of_its_own

REPOSITORY = Path(__file__).resolve().parents[2]
ADAPTERS = Path(__file__).resolve().parent / "peers"
LAST_LINES = 15  # of the log of a process that failed

Measures = dict[str, float]
Contender = Callable[[], Measures]


@dataclass(kw_only=True)
class ContenderArguments(ReportArguments):
    """The contenders."""

    contenders: list[str] = flag([], "names from the table to run; default: all that are available")
    threads: int = flag(0, "threads of each contender; 0 = one for each core", at_least=0)


@dataclass(kw_only=True)
class TrlArguments(Arguments):
    """TRL."""

    trl_python: str | None = flag(None, "python of an environment with TRL")

    def trl(self, advice: str = "pip install trl") -> str | None:
        """Its interpreter; None, with a line that says how to give one, if the flag is not set.

        Raises:
            InputError: there is no such file.
        """
        if self.trl_python is None:
            print(f"TRL is left out: --trl_python takes the python of an environment with `{advice}`")
        return _interpreter(self.trl_python, "--trl_python")


@dataclass(kw_only=True)
class DeepSpeedChatArguments(Arguments):
    """DeepSpeed-Chat."""

    deepspeed_chat: str | None = flag(None, "checkout of DeepSpeedExamples, or of the DeepSpeed-Chat in it")
    deepspeed_chat_python: str | None = flag(None, "python of an environment with deepspeed and transformers 4.46")

    def deepspeed(self) -> tuple[str, str] | None:
        """Its interpreter and its checkout; None, with a line that says how to give them, if a flag is not set.

        Raises:
            InputError: one of them is not there.
        """
        if self.deepspeed_chat is None or self.deepspeed_chat_python is None:
            print("DeepSpeed-Chat is left out: give --deepspeed_chat CHECKOUT and --deepspeed_chat_python PYTHON")
            return None
        if not Path(self.deepspeed_chat).is_dir():
            raise InputError(
                f"--deepspeed_chat {self.deepspeed_chat}: no such folder; give a checkout of its repository"
            )
        python = _interpreter(self.deepspeed_chat_python, "--deepspeed_chat_python")
        return python, str(Path(self.deepspeed_chat).resolve())


def _interpreter(path: str | None, name: str) -> str | None:
    if path and not Path(path).is_file():
        raise InputError(f"{name} {path}: no such file; give the python of an environment with the peer installed")
    return path and str(Path(path).absolute())  # not resolved: the python of an environment is a symlink to one outside


def run_process(command: Sequence[str], log: Path, threads: int, environment: Mapping[str, str]) -> float:
    """Run `command` to its end and return its peak memory in GiB: GPU memory if there is a GPU, else resident memory.

    Raises:
        SystemExit: it failed; the message ends with the last lines of its output, which is in `log`.
    """
    threads = threads or len(os.sched_getaffinity(0))
    variables = environment_of_its_own()
    variables.pop("PYTHONPATH", None)
    variables |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output, gpu_memory() as gpu:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables | environment, cwd=log.parent
        )
        # The peak of this process alone; getrusage would give the largest of all. It includes the time between fork and
        # exec, when it is that of this script, which is less than any contender takes, since all of them import torch.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise SystemExit(f"error: {' '.join(command[:2])} ended with code {process.returncode}:\n{end}")
    return gpu["GiB"] if torch.cuda.is_available() else usage.ru_maxrss / 2**20


@contextmanager
def gpu_memory():
    """Yield a dictionary whose "GiB" is, after the block, the peak of GPU memory in use less what was in use before."""
    peak = {"GiB": 0.0}
    if not torch.cuda.is_available():
        yield peak
        return
    before, finished = _gpu_in_use(), threading.Event()

    def watch() -> None:
        while not finished.wait(0.1):
            peak["GiB"] = max(peak["GiB"], _gpu_in_use() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        finished.set()
        watcher.join()


def _gpu_in_use() -> float:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) / 2**10


class Runner:
    """Runs contenders, each in a separate process and folder, and keeps the versions of the peers' libraries."""

    def __init__(self, folder: Path, threads: int) -> None:
        """
        Args:
            folder: parent of the contenders' folders.
            threads: number for each contender; 0 = one for each core.
        """
        self.folder, self.threads = folder, threads
        self.versions: dict[str, dict[str, str]] = {}

    def run_step(self, name: str, script: str, flags: Mapping[str, Any]) -> tuple[list[dict], Measures]:
        """Run a step's main.py as its users do; return the rows of its metrics.jsonl and its peak memory.

        Args:
            name: folder for output and logs.
            script: folder below training/.
            flags: those of the command line; True for a switch, a list for several values.
        """
        folder = self.folder / name
        command = [sys.executable, str(REPOSITORY / "training" / script / "main.py")]
        for flag_name, value in {**flags, "output_dir": folder / "output"}.items():
            command.append(f"--{flag_name}")
            if value is not True:
                command += [str(item) for item in (value if isinstance(value, list) else [value])]
        peak = run_process(command, folder / "log.txt", self.threads, {"PYTHONPATH": str(REPOSITORY)})
        return read_metrics(folder / "output" / METRICS_FILE), {MEMORY: peak}

    def run_peer(
        self, name: str, adapter: str, python: str, setting: Mapping[str, Any]
    ) -> tuple[list[dict[str, float]], Measures]:
        """Run an adapter of peers/ under the peer's own interpreter; return the steps it measured and its peak memory.

        Args:
            name: name of the peer, under which its versions are kept.
            setting: what the adapter reads from its JSON file, except "scratch", a folder that it may write to.
        """
        folder = self.folder / adapter
        folder.mkdir(parents=True, exist_ok=True)
        request, answer = folder / "setting.json", folder / "measured.json"
        request.write_text(json.dumps({**setting, "scratch": str(folder)}), encoding="utf-8")
        answer.unlink(missing_ok=True)
        command = [python, str(ADAPTERS / f"{adapter}.py"), str(request), str(answer)]
        accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
        peak = run_process(command, folder / "log.txt", self.threads, accelerator)
        measured = json.loads(answer.read_text(encoding="utf-8"))
        self.versions[name] = measured["versions"]
        return measured["steps"], {MEMORY: peak}


def our_rates(rows: Sequence[dict], amounts: Mapping[str, float]) -> Measures:
    """`amounts` per second in the second of two passes, from the times at which rows of metrics.jsonl were written."""
    times = [row["time"] for row in rows if "train/loss" in row]
    seconds = times[-1] - times[len(times) // 2 - 1]
    return {f"{name}/s": amount / seconds for name, amount in amounts.items()}


def peer_rates(steps: Sequence[dict[str, float]]) -> Measures:
    """What an adapter counted in its steps, per second, in the second of two passes."""
    second = steps[len(steps) // 2 :]
    sums = {name: sum(step[name] for step in second) for name in second[0]}
    seconds = sums.pop("seconds")
    return {f"{name}/s": amount / seconds for name, amount in sums.items()}


def interleave(contenders: Mapping[str, Contender], repeats: int, chosen: Sequence[str]) -> dict[str, dict]:
    """Run the contenders in turn, `repeats` times; name -> measure -> its values.

    Raises:
        InputError: a name in `chosen` is not one of them.
    """
    unknown = [name for name in chosen if name not in contenders]
    if unknown:
        raise InputError(f"--contenders {unknown[0]!r} is not one of {', '.join(contenders)}")
    chosen = chosen or list(contenders)
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in contenders if name in chosen}
    for repetition in range(repeats):
        for name, values in measured.items():
            print(f"{repetition + 1} of {repeats}: {name}", end="", flush=True)
            measures = contenders[name]()
            print(": " + ", ".join(f"{value:.4g} {measure}" for measure, value in measures.items()), flush=True)
            for measure, value in measures.items():
                values.setdefault(measure, []).append(value)
    return measured


def measure(
    config: ContenderArguments, contenders: Callable[[Any, Runner], dict[str, Contender]]
) -> tuple[dict[str, dict], dict]:
    """Interleave what `contenders(config, runner)` returns, in a temporary folder; also returns the peers' versions."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), config.threads)
        measured = interleave(contenders(config, runner), config.repeats, config.contenders)
    return measured, runner.versions
