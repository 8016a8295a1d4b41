"""A run of a sweep as an ordinary command of the project, in processes of its own."""

import contextlib
import fcntl
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.arguments.steps import STEPS
from utils.errors import InputError
from utils.parallel.launcher import environment_of_its_own
from utils.sweeps.folders import Place

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS_TO_STOP = 10  # of a run without checkpoints; one with them finishes its step and saves


def command_of(place: Place, step: str, num_gpus: int | None, *, free_port: bool = False) -> list[str]:
    """The words of the command: plain Python for one process, or DeepSpeed's launcher for `num_gpus` of them.

    Args:
        free_port: choose a port that is free now for the launcher, whose own choice may be in use.
    """
    script = REPOSITORY / "training" / STEPS[step].folder / "main.py"
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    launcher = []
    if num_gpus is not None:
        launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(num_gpus)]
        launcher += ["--master_port", _free_port()] if free_port else []
    resume = ["--resume_from_checkpoint", "auto"] if place.resumes else []
    return [sys.executable, *launcher, str(script), *place.run.words, "--output_dir", str(place.folder), *resume]


def run_to_its_end(command: list[str], place: Place) -> int:
    """Run the command, with all its output in the run's log, and return its exit code.

    It runs in the working directory and in a process group of its own. Ctrl-C passes SIGINT on to that group, so that
    the run stops cleanly; a second one kills it.

    Raises:
        InputError: a run of another sweep is still writing to the log.
        KeyboardInterrupt: after the run has stopped.
    """
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = environment_of_its_own() | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    with _locked_log(place.log) as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _stop(process, place)
            raise
        _end_group(process, SECONDS_TO_STOP)  # a launcher may return before its processes, which hold the GPUs
        return code


def last_error(log: Path) -> str:
    """The last line of a log that says why the run ended; empty where none does."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        beginning = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=0)
        errors = [line for line in lines[beginning:] if line.startswith(("error: ", "stopped: "))]
        raised = [line for line in lines[beginning:] if line.partition(":")[0].endswith(("Error", "Exception"))]
        return (errors or raised or [""])[-1].strip()
    return ""


@contextlib.contextmanager
def _locked_log(path: Path) -> Iterator[IO[str]]:
    """The log, opened to append to it. The run's processes inherit the lock, so that it outlives this one if it is
    killed, and no second sweep starts the same run beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another sweep's run is still writing to it; wait for it, or stop it") from None
        yield log


def _stop(process: subprocess.Popen, place: Place) -> None:
    saves = bool(place.run.config.save_interval)
    print(f"\nstopping {place.run.name}{' (it saves first)' if saves else ''}; Ctrl-C again: at once", flush=True)
    try:
        _signal_group(process, signal.SIGINT)
        _end_group(process, math.inf if saves else SECONDS_TO_STOP)
    except KeyboardInterrupt:
        _end_group(process, 0)


def _end_group(process: subprocess.Popen, seconds: float) -> None:
    """Wait until all processes of the run have ended, and kill those that are left after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and _signal_group(process, 0):
        process.poll()  # a process that has ended stays in its group until it is waited for
        time.sleep(0.1)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    """Send a signal to the processes of the run, 0 for none; whether there are any."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
