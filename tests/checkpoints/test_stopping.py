"""Runs that are really stopped: by SIGTERM and Ctrl-C, alone and under the launcher, and by SIGKILL."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from processes import TIMEOUT
from step_scripts import REPOSITORY, flags, run_step, script_of

from utils.checkpoints import folders

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
LONG = {"max_steps": 100_000, "lr_scheduler_type": "constant", "num_sample_generations": 0}


def load_script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / "scripts" / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def start(step: int, argv: list[str], *, ranks: int = 1) -> subprocess.Popen:
    """A run in its own session, so that a signal to its group reaches all its processes as Ctrl-C does."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", "29712"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(script_of(step)), *argv]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_rows(output: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    path = output / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the run does not come along"
        time.sleep(0.05)


def ends(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code and output once all its processes are gone: those that are left would hold the pipes open."""
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def finishes(step: int, argv: list[str], *, ranks: int = 1) -> str:
    code, out, err = ends(start(step, argv, ranks=ranks))
    assert code == 0, err[-3000:]
    return out


def only_checkpoint(output: Path) -> int:
    """The step of the one checkpoint, which is whole."""
    (step,) = folders.checkpoint_steps(output / "checkpoints")
    folder = folders.checkpoint_path(output / "checkpoints", step)
    records = folders.read_manifest(folder)
    assert not isinstance(records, str) and folders.wrong_checksum(folder, records, records) is None
    return step


def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(world, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = start(1, flags(world, 1, stopped, save_interval=100_000, **LONG))
    wait_for_rows(stopped, 5)
    process.send_signal(signal.SIGTERM)
    code, _, errors = ends(process)
    assert code == 75
    step = only_checkpoint(stopped)
    assert f"stopped: SIGTERM after step {step}, which was saved" in errors
    assert not (stopped / "model.safetensors").exists()
    changes = LONG | {"max_steps": step + 2, "save_interval": 100_000}
    run_step(1, flags(world, 1, stopped, resume_from_checkpoint="auto", **changes))
    run_step(1, flags(world, 1, whole, **changes))
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_killed_runs_end_as_if_nothing_had_happened(world, tmp_path, monkeypatch):
    """The short form of the benchmark: killed while saving, while starting, and while training."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    script = load_script("benchmarks/kill_and_resume.py")
    changes = {"enable_ema": True, "kl_target": 1.0, "max_steps": 1}
    rows = script.kill_and_resume(flags(world, 3, **changes), tmp_path, kills=3, processes=1, seed=1)
    assert [moment for _, moment, *_ in rows] == ["saving", "starting", "training"]


def rank_processes(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks of a launched run: what the launcher, itself a child of the runner, has started."""
    (launcher,) = psutil.Process(process.pid).children()
    return launcher.children()


@pytest.mark.parametrize(
    "target", ["terminal", *(pytest.param(target, marks=pytest.mark.slow) for target in ("launcher", "one rank"))]
)
def test_two_ranks_stop_at_the_same_iteration(world, tmp_path, target):
    """Ctrl-C in a terminal reaches every process, and the launcher then sends SIGTERM to the ranks one by one."""
    changes = LONG | {"eval_prompts": 2, "save_interval": 100_000, "actor_zero_stage": 2, "critic_zero_stage": 2}
    changes.pop("num_sample_generations")
    process = start(3, flags(world, 3, tmp_path, **changes), ranks=2)
    wait_for_rows(tmp_path, 3)
    ranks = rank_processes(process)
    assert len(ranks) == 2
    if target == "terminal":
        os.killpg(process.pid, signal.SIGINT)
    elif target == "launcher":
        psutil.Process(ranks[0].ppid()).send_signal(signal.SIGTERM)
    else:
        ranks[1].send_signal(signal.SIGTERM)
    code, _, errors = ends(process)
    assert not any(rank.is_running() for rank in ranks)
    step = only_checkpoint(tmp_path)
    assert f"after step {step}, which was saved" in errors, errors[-3000:]
    assert code == {"terminal": -2, "launcher": 1, "one rank": 75}[target]  # the first two are the launcher's own codes


SECOND_SIGNAL = """
import os, signal, sys
from utils.checkpoints import signals
requests = signals.StopSignals()
requests.activate()
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, of the same request
print(requests.name, flush=True)
signals.SAME_REQUEST_SECONDS = -1.0
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""


def test_a_second_signal_ends_the_process_at_once():
    result = subprocess.run(
        [sys.executable, "-c", SECOND_SIGNAL], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 128 + signal.SIGTERM and result.stdout == "SIGINT\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_model_script_saves_and_logs_when_a_signal_reaches_all_its_processes(world, tmp_path, number):
    """Ctrl-C, or a scheduler's SIGTERM: it reaches the script's `tee` too, through which the run prints."""
    launcher = tmp_path / "bin" / "deepspeed"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    (tmp_path / "run.log").write_text("the run before\n")
    changes = LONG | {"save_interval": 100_000, "num_warmup_steps": 0, "zero_stage": 0}
    process = subprocess.Popen(
        ["bash", str(REPOSITORY / "scripts" / "opt-1.3b" / "step1.sh"), *flags(world, 1, **changes)],
        env=ENVIRONMENT
        | {"PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}", "OUTPUT": str(tmp_path / "run")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_rows(tmp_path / "run", 5)
    os.killpg(process.pid, number)
    ends(process)
    step = only_checkpoint(tmp_path / "run")
    log = (tmp_path / "run.log").read_text()
    assert log.startswith("the run before\n")
    assert f"{number.name} after step {step}, which was saved" in log


BROKEN_PIPE = """
import os, signal
from utils.checkpoints import signals
requests = signals.StopSignals()
requests.activate()
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 2)
os.kill(os.getpid(), signal.SIGINT)
print(requests.name, flush=True)
"""


def test_a_signal_is_heard_when_nobody_reads_what_is_printed():
    result = subprocess.run([sys.executable, "-c", BROKEN_PIPE], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert (result.returncode, result.stdout) == (0, "SIGINT\n")


def test_without_save_interval_signals_mean_what_they_always_do(world, tmp_path):
    process = start(1, flags(world, 1, tmp_path, **LONG))
    wait_for_rows(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert ends(process)[0] == -signal.SIGTERM
    assert not (tmp_path / "checkpoints").exists()
