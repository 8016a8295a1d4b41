"""The quickstart's commands, its failures, and a whole run on a world so small that alignment must fail."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from step_scripts import REPOSITORY, STEPS, load_step

from utils.arguments.run import parse_config
from utils.toy.files import WorldSizes, write_world


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


quickstart = load_script("quickstart")
toy_seeds = load_script("benchmarks/toy_seeds")


def stages_in(folder, method="ppo"):
    files = quickstart.WorldFiles(*(folder / field.name for field in dataclasses.fields(quickstart.WorldFiles)))
    return quickstart.make_stages(files, folder, 7, method)


@pytest.mark.parametrize("method", ["ppo", *quickstart.DIRECT])
def test_every_command_parses(tmp_path, method):
    for stage in stages_in(tmp_path, method):
        step = next(name for name, path in STEPS.items() if path == REPOSITORY / stage.script)
        config = parse_config(load_step(step).Config, stage.arguments()[1:])
        assert config.output_dir == str(stage.folder)
        assert config.seed == 7


def test_the_printed_command_is_the_one_that_runs(tmp_path):
    for stage in stages_in(tmp_path / "a folder"):
        shown = subprocess.run(
            ["bash", "-c", f"python() {{ printf '%s\\n' \"$@\"; }}\n{stage.command()}"], capture_output=True, text=True
        )
        assert shown.stdout.splitlines() == stage.arguments()


def test_output_dir_that_cannot_be_written(tmp_path, capfd):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        quickstart.run(quickstart.main, quickstart.Config, ["--output_dir", str(tmp_path / "file" / "folder")])
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert "--output_dir" in error and error.count("\n") == 1


def test_a_stage_that_fails_ends_the_run_with_1(tmp_path, capfd):
    stage = stages_in(tmp_path)[1]
    with pytest.raises(SystemExit) as ended:
        quickstart.run_stage(stage)
    assert ended.value.code == 1
    assert f"ended with exit code 2; see {stage.log}" in capfd.readouterr().err


def children_of(pid: int) -> list[int]:
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_run_takes_its_stage_along(tmp_path, number):
    command = [sys.executable, str(REPOSITORY / "scripts" / "quickstart.py"), "--output_dir", str(tmp_path)]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "step 1" not in (tmp_path / "err").read_text():  # the progress of the first stage
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        (stage,) = children_of(process.pid)
        process.send_signal(number)
        assert process.wait(30) == 130
    finally:
        if process.poll() is None:
            process.kill()
    assert not os.path.exists(f"/proc/{stage}")
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_a_whole_run_in_a_world_too_small(tmp_path, monkeypatch, capfd):
    """Two steps per stage align nothing: all files are there, the exit code is 1, and it says why."""
    make_stages = quickstart.make_stages

    def short_stages(*arguments):
        sizes = {"per_device_train_batch_size": 8, "eval_samples": 8, "max_steps": 2}
        rollout = {"per_device_generation_batch_size": 8, "per_device_training_batch_size": 8, "max_steps": 2}
        return [
            dataclasses.replace(stage, flags=stage.flags | (rollout if stage.folder.name == "ppo" else sizes))
            for stage in make_stages(*arguments)
        ]

    sizes = WorldSizes(pretraining=300, sft=300, preference=40, held_out=16)
    monkeypatch.setattr(quickstart, "make_stages", short_stages)
    monkeypatch.setattr(quickstart, "write_world", lambda folder, seed: write_world(folder, seed, sizes))
    with pytest.raises(SystemExit) as ended:
        quickstart.main(quickstart.Config(output_dir=str(tmp_path)))
    assert ended.value.code == 1
    captured = capfd.readouterr()
    assert "alignment did not work: reward model" in captured.err
    assert "[4/4] step 3, PPO" in captured.out and "did alignment work?" in captured.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"] and set(report["seconds"]) == {"base", "sft", "reward", "ppo", "total"}
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert "FAILED" in (tmp_path / "report.md").read_text()
    assert quickstart.judged_rollouts((tmp_path / "ppo.log").read_text(), 2)
    assert toy_seeds.table_row(report)[-1] == "FAILED"


@pytest.mark.slow
def test_alignment_works(tmp_path):
    command = [sys.executable, str(REPOSITORY / "scripts" / "quickstart.py"), "--output_dir", str(tmp_path)]
    assert subprocess.run(command).returncode == 0
