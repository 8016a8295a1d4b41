"""Whole sweeps on tiny models: what runs, what is skipped, what is continued, and what is said at the end."""

import fcntl
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from step_scripts import REPOSITORY, run_step

from utils.arguments.run import save_config
from utils.sweeps import processes, running
from utils.sweeps.folders import find_places
from utils.sweeps.grid import read_sweep
from utils.sweeps.picture import draw_sweep
from utils.sweeps.report import Outcome, render_markdown, render_text, table_rows

SCRIPT = REPOSITORY / "scripts" / "sweep.py"
_spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def write(path: Path, world, **changes) -> Path:
    flags = {
        "model_name_or_path": world["model"], "data_path": world["data"], "data_output_path": world["cache"],
        "data_split": "1,0,0", "dtype": "fp32", "max_seq_len": 64, "per_device_train_batch_size": 4,
        "num_sample_generations": 0, "max_steps": 1, "eval_samples": 2,
    }  # fmt: skip
    content = {"step": "step1", "grid": {"learning_rate": [1e-4, 1e-3]}, "metric": "eval/loss", "goal": "min"}
    content |= {"flags": flags | changes.pop("flags", {})} | changes
    content["flags"] = {name: value for name, value in content["flags"].items() if name not in content["grid"]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Runs:
    """Stands in for the processes of runs: notes the commands, and writes what a run would."""

    def __init__(self, monkeypatch) -> None:
        self.commands: list[list[str]] = []
        self.codes: dict[str, int] = {}
        monkeypatch.setattr(running, "run_to_its_end", self)

    def __call__(self, command, place) -> int:
        self.commands.append(command)
        code = self.codes.get(place.run.name, 0)
        if code == 0:
            finish(place.run.config, len(self.commands))
        else:
            place.log.write_text("error: no\n$ a command\nnoise\nerror: it broke\nmore noise\n")
        return code

    def names(self) -> list[str]:
        words = [command[command.index("--output_dir") + 1] for command in self.commands]
        self.commands = []
        return [Path(word).name for word in words]


def finish(config, loss: float) -> None:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "run_config.yaml")
    summary = {"eval/loss": loss, "train_seconds": 10.0 * loss, "run": {"processes": 1}}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runs(monkeypatch) -> Runs:
    return Runs(monkeypatch)


def sweep(file: Path, output: Path, *further: str) -> int:
    try:
        script.main([str(file), "--output_dir", str(output), *further])
    except SystemExit as end:
        return end.code
    return 0


def test_finished_runs_are_skipped_also_when_the_grid_changes(world, tmp_path, runs, capsys):
    file, output = tmp_path / "s.yaml", tmp_path / "out"
    assert sweep(write(file, world), output) == 0
    assert runs.names() == ["learning_rate-0.0001", "learning_rate-0.001"]
    assert sweep(file, output) == 0 and runs.names() == []
    assert "[2/2] learning_rate-0.001: finished before, eval/loss 2" in capsys.readouterr().out
    more = {"learning_rate": [1e-3, 1e-2]}  # one value goes, one comes
    assert sweep(write(file, world, grid=more), output) == 0 and runs.names() == ["learning_rate-0.01"]
    assert [run["name"] for run in json.loads((output / "sweep.json").read_text())["runs"]] == [
        "learning_rate-0.01", "learning_rate-0.001",
    ]  # fmt: skip
    another = more | {"lora_dim": [0, 2]}  # names change, and runs without LoRA are the same as before
    assert sweep(write(file, world, grid=another), output) == 0
    assert runs.names() == ["learning_rate-0.001_lora_dim-2", "learning_rate-0.01_lora_dim-2"]
    # What only affects the output makes no other run.
    assert sweep(write(file, world, grid=another, flags={"save_interval": 5}), output) == 0 and runs.names() == []
    (output / "learning_rate-0.001" / "summary.json").unlink()  # as if it had not finished
    assert sweep(write(file, world, grid=more), output) == 0 and runs.names() == ["learning_rate-0.001"]


@pytest.mark.parametrize(
    ("flags", "further", "message"),
    [
        ({"max_steps": 2}, [], "holds a run with --max_steps 1, and not 2; name another --output_dir, or remove"),
        ({}, ["--weight_decay", "0.5"], "holds a run with --weight_decay 0.0, and not 0.5"),
        ({}, ["--num_gpus", "2"], "holds a run on 1 processes, and not 2"),
    ],
)
def test_another_run_is_not_written_over(world, tmp_path, runs, flags, further, message):
    file, output = tmp_path / "s.yaml", tmp_path / "out"
    assert sweep(write(file, world), output) == 0 and runs.names()
    with pytest.raises(script.InputError, match=message):
        sweep(write(file, world, flags=flags), output, *further)
    assert runs.names() == []


def test_checkpoints_of_other_flags_are_not_continued_and_own_ones_are(world, tmp_path, runs):
    file, output = write(tmp_path / "s.yaml", world, flags={"save_interval": 1}), tmp_path / "out"
    (interrupted, _) = read_sweep(file, output).runs
    finish(interrupted.config, 1.0)
    folder = output / interrupted.name
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(script.InputError, match="holds a run with --seed 1234, and not 7"):
        sweep(file, output, "--seed", "7")
    assert sweep(write(file, world), output) == 0  # without save_interval too: the step would refuse a fresh start
    assert "--resume_from_checkpoint auto" in " ".join(runs.commands[0])
    assert "--resume_from_checkpoint" not in runs.commands[1]


def test_failures_are_reported_at_the_end(world, tmp_path, runs, capsys):
    file, output = write(tmp_path / "s.yaml", world), tmp_path / "out"
    runs.codes["learning_rate-0.0001"] = 3
    assert sweep(file, output) == 1
    assert runs.names() == ["learning_rate-0.0001", "learning_rate-0.001"]
    printed = capsys.readouterr()
    log = output / "learning_rate-0.0001.log"
    assert "[1/2] learning_rate-0.0001: FAILED with exit code 3 after 0 s: error: it broke" in printed.out
    assert printed.err == f"error: learning_rate-0.0001 failed: error: it broke; log: {log}\n"
    assert f"- learning_rate-0.0001: error: it broke; log: `{log}`" in (output / "sweep.md").read_text()
    assert sweep(file, output, "--stop_on_failure") == 1 and runs.names() == ["learning_rate-0.0001"]
    assert (output / "sweep.png").stat().st_size > 5000
    runs.codes.clear()
    assert sweep(file, output) == 0 and runs.names() == ["learning_rate-0.0001"]


def test_an_unknown_metric_is_named_and_nothing_is_lost(world, tmp_path, runs):
    file, output = write(tmp_path / "s.yaml", world, metric="eval/perplexity"), tmp_path / "out"
    known = "metric: the summaries have no eval/perplexity; they have eval/loss, train_seconds"
    with pytest.raises(script.InputError, match=known):
        sweep(file, output)
    assert len(runs.names()) == 2
    with pytest.raises(script.InputError, match=known):  # now before anything runs
        sweep(write(file, world, metric="eval/perplexity", grid={"learning_rate": [1e-4, 1e-5]}), output)
    assert runs.names() == []
    assert sweep(write(file, world), output) == 0 and runs.names() == []


def test_the_dry_run_prints_commands_and_writes_nothing(world, tmp_path, runs, capsys):
    assert sweep(write(tmp_path / "s.yaml", world), tmp_path / "out", "--num_gpus", "2", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# learning_rate-0.0001: not run" and len(lines) == 4
    assert "-m deepspeed.launcher.runner --num_gpus 2 " in lines[1] and "--learning_rate 0.0001 " in lines[1]
    assert not (tmp_path / "out").exists()


# --- table and picture -----------------------------------------------------------------------------------------------


def outcomes_of(losses: dict[tuple, float | None]) -> list[Outcome]:
    return [
        Outcome(
            name=str(values),
            folder=Path("out") / str(values),
            log=Path("out") / f"{values}.log",
            values=dict(zip(("learning_rate", "lora_dim", "offload"), values, strict=False)),
            numbers={} if loss is None else {"eval/loss": loss, "train_seconds": 12.3456},
            state="failed" if loss is None else "finished",
            command=f"python main.py {values}",
            reason="error: a | b" if loss is None else "",
        )
        for values, loss in losses.items()
    ]


LOSSES = {(1e-4, 0): 2.0, (1e-4, 4): None, (1e-3, 0): 1.25, (1e-3, 4): float("nan")}


@pytest.mark.parametrize(("goal", "order"), [("min", [1.25, 2.0]), ("max", [2.0, 1.25])])
def test_the_table_is_sorted_by_the_metric(world, tmp_path, goal, order):
    file = write(tmp_path / "s.yaml", world, grid={"learning_rate": [1e-4, 1e-3], "lora_dim": [0, 4]}, goal=goal)
    found, outcomes = read_sweep(file, tmp_path), outcomes_of(LOSSES)
    header, rows = table_rows(found, outcomes)
    assert header == ["", "learning_rate", "lora_dim", "eval/loss", "train_seconds", "state"]
    first = ("1", "0.001", "0", "1.25", "12.35", "finished") if goal == "min" else ("1", "0.0001", "0", "2", "12.35")
    assert rows[0][: len(first)] == first
    assert [float(row[3]) for row in rows[:2]] == order
    assert rows[2:] == [("–", "0.0001", "4", "–", "–", "failed"), ("–", "0.001", "4", "nan", "12.35", "finished")]
    text = render_markdown(found, outcomes, picture=True)
    best = "(0.001, 0)" if goal == "min" else "(0.0001, 0)"
    assert f"python main.py {best}\n" in text and "![eval/loss of the runs](sweep.png)" in text
    assert "step1: eval/loss, " + ("lowest" if goal == "min" else "highest") in render_text(found, outcomes)


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ({"learning_rate": [1e-4, 1e-3]}, "lines"),
        ({"learning_rate": [1e-4, 1e-3], "lora_dim": [0, 4]}, "images"),
        ({"learning_rate": [1e-4, 1e-3], "lora_dim": [0, 4], "offload": [True, False]}, "lines"),
    ],
    ids=["line", "map", "dots"],
)
def test_the_picture(world, tmp_path, grid, kind, monkeypatch):
    from matplotlib.figure import Figure

    found = read_sweep(write(tmp_path / "s.yaml", world, grid=grid), tmp_path)
    losses = {values: float(number) for number, values in enumerate(itertools.product(*grid.values()), start=1)}
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    assert draw_sweep(found, outcomes_of(losses), tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    axis = figures[0].axes[0]
    assert getattr(axis, kind)
    drawn = {text.get_text() for text in axis.texts}
    assert drawn == {f"{loss:.4g}" for loss in losses.values()}
    if kind == "images":
        assert axis.images[0].get_array().tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert draw_sweep(found, outcomes_of(dict.fromkeys(losses)), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


# --- in processes ----------------------------------------------------------------------------------------------------


def start(file: Path, output: Path, *further: str, stdout) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(file), "--output_dir", str(output), *further]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def refuses(*argv: str) -> str:
    result = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_refusals_are_one_line(world, tmp_path):
    file = write(tmp_path / "s.yaml", world, grid={"learning_rate": [1e-4, -1]})
    line = refuses(str(file), "--output_dir", str(tmp_path / "out"))
    assert line == f"error: {file}: run learning_rate--1.0: --learning_rate must be above 0, got -1.0\n"
    assert refuses().startswith("error: the following arguments are required: FILE.yaml")
    assert refuses("--num_gpus", "2").startswith("error: name the sweep's file first")
    assert refuses(str(file), "--num_gpus", "0").startswith("error: --num_gpus 0: give 1 or more")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_a_sweep_that_is_stopped_in_its_second_run_continues_there(world, tmp_path):
    """SIGTERM in the middle of it: the run saves a checkpoint first. The next sweep only does what is missing."""
    file = write(tmp_path / "s.yaml", world, flags={"save_interval": 100_000}, grid={"max_steps": [1, 150]})
    output, printed = tmp_path / "out", tmp_path / "printed"
    metrics = output / "max_steps-150" / "metrics.jsonl"
    done = read_sweep(file, output).runs[0]
    run_step(1, [*done.words, "--output_dir", done.config.output_dir])  # in this process, which is quicker
    first = (output / "max_steps-1" / "summary.json").read_bytes()
    with open(printed, "w") as out:
        process = start(file, output, stdout=out)
        try:
            deadline = time.monotonic() + 120
            while not metrics.exists() or metrics.read_text().count("\n") < 3:
                assert process.poll() is None and time.monotonic() < deadline, printed.read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130
        finally:
            process.kill()
    text = printed.read_text()
    assert "[1/2] max_steps-1: finished before" in text and "stopping max_steps-150 (it saves first)" in text
    assert text.endswith("error: interrupted; the same command continues the sweep\n") and "Traceback" not in text
    states = {run["name"]: run["state"] for run in json.loads((output / "sweep.json").read_text())["runs"]}
    assert states == {"max_steps-1": "finished", "max_steps-150": "interrupted"}
    (checkpoint,) = metrics.parent.glob("checkpoints/checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 150

    with open(printed, "w") as out:
        assert start(file, output, stdout=out).wait(120) == 0, printed.read_text()
    assert "[1/2] max_steps-1: finished before" in printed.read_text()
    assert (output / "max_steps-1" / "summary.json").read_bytes() == first
    assert json.loads((metrics.parent / "summary.json").read_text())["steps"] == 150
    assert str(checkpoint) in (output / "max_steps-150.log").read_text().rpartition("$ ")[2]  # it says where it resumes
    trained = [json.loads(line) for line in metrics.open()]
    assert [row["step"] for row in trained if "train/loss" in row] == list(range(1, 151))


def test_no_process_of_a_run_is_left_when_the_next_one_starts(world, tmp_path, monkeypatch):
    """A launcher that has failed may return before the processes that it started, which would still hold the GPUs."""
    monkeypatch.setattr(processes, "SECONDS_TO_STOP", 0.5)
    found = read_sweep(write(tmp_path / "s.yaml", world), tmp_path / "out")
    place = find_places(found, tmp_path / "out", 1)[0]
    command = ["bash", "-c", "sleep 60 & echo $! > $0; exit 7", str(tmp_path / "pid")]
    assert processes.run_to_its_end(command, place) == 7
    deadline = time.monotonic() + 10
    pid = int((tmp_path / "pid").read_text())
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
    with open(place.log) as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free for the next sweep


def is_running(pid: int) -> bool:
    """False for a process that has ended, also before its parent has asked for its exit code."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_that_outlives_its_sweep_is_not_started_again(world, tmp_path):
    """SIGKILL ends the sweep alone. Its run holds the lock of the log until it ends."""
    output = tmp_path / "out"
    output.mkdir()
    with open(output / "learning_rate-0.0001.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(script.InputError, match="another sweep's run is still writing to it"):
            sweep(write(tmp_path / "s.yaml", world), output)
