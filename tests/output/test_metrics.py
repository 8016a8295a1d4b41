"""The metrics file survives what runs go through: crashes, NaN, resuming, several ranks."""

import json
import subprocess
import sys

import pytest
import torch

from utils.errors import InputError
from utils.output.metrics import MetricsWriter, read_metrics


def writer(output_dir, **options):
    defaults = {"job_name": "sft", "total_steps": 10, "is_main": True}
    return MetricsWriter(output_dir, **(defaults | options))


def strict_rows(path):
    """Rows of a file strictly by the JSON standard, which has neither NaN nor Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_rows_hold_step_time_and_metrics(tmp_path):
    with writer(tmp_path / "new" / "folder") as metrics:
        metrics.log(0, {"eval/perplexity": 12.5})
        metrics.log(1, {"train/loss": torch.tensor(2.25), "train/tokens": 512}, bar=["train/loss"])
    first, second = strict_rows(tmp_path / "new" / "folder" / "metrics.jsonl")
    assert list(first) == ["step", "time", "eval/perplexity"]
    assert first["step"] == 0 and first["eval/perplexity"] == 12.5
    assert second["train/loss"] == 2.25 and second["train/tokens"] == 512
    assert second["time"] >= first["time"] > 1.6e9


def test_nan_and_infinity_are_null(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.log(1, {"a": float("nan"), "b": float("inf"), "c": torch.tensor(float("-inf")), "d": 1.0})
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, None, 1.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [row]


def test_rows_survive_a_process_that_is_killed(tmp_path):
    script = """if True:
        import os, signal, sys
        from utils.output.metrics import MetricsWriter
        metrics = MetricsWriter(sys.argv[1], job_name="sft", total_steps=100, is_main=True)
        for step in range(1, 51):
            metrics.log(step, {"train/loss": 1 / step}, bar=["train/loss"])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=120)
    assert process.returncode == -9, process.stderr.decode()
    rows = strict_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 51))
    assert rows[-1]["train/loss"] == 1 / 50


def test_rows_are_on_disk_before_close(tmp_path):
    metrics = writer(tmp_path)
    metrics.log(1, {"train/loss": 1.0})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    metrics.close()
    metrics.close()


def test_logging_interval_thins_progress_but_keeps_results(tmp_path):
    with writer(tmp_path, logging_interval=4) as metrics:
        for step in range(1, 11):
            metrics.log(step, {"train/loss": float(step)}, bar=["train/loss"])
            if step == 6:
                metrics.log(step, {"eval/loss": 0.5})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 4, 8, 10]
    assert [row["step"] for row in rows if "eval/loss" in row] == [6]


def test_the_last_row_before_a_failure_is_kept(tmp_path):
    with pytest.raises(RuntimeError), writer(tmp_path, logging_interval=4) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"train/loss": float(step)}, bar=["train/loss"])
        raise RuntimeError
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_a_new_run_starts_a_new_file(tmp_path):
    for loss in (1.0, 2.0):
        with writer(tmp_path) as metrics:
            assert metrics.position == 0
            metrics.log(1, {"train/loss": loss})
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def test_a_resumed_run_continues_from_its_checkpoint(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.log(1, {"train/loss": 1.0})
        metrics.log(2, {"train/loss": 2.0})
        position = metrics.position
        metrics.log(3, {"train/loss": 999.0})  # logged after the checkpoint, then the run was killed
    with writer(tmp_path, start_step=2, position=position) as metrics:
        assert metrics.position == position
        metrics.log(3, {"train/loss": 3.0})
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]


def test_a_position_past_the_end_of_the_file_adds_nothing(tmp_path):
    with writer(tmp_path, position=1000) as metrics:
        metrics.log(1, {"train/loss": 1.0})
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_write_and_print_nothing(tmp_path, capfd):
    with writer(tmp_path, is_main=False, enable_tensorboard=True) as metrics:
        metrics.log(1, {"train/loss": 1.0}, bar=["train/loss"])
        metrics.print("hello")
        metrics.table("title", [("a",)], ("b",))
        assert metrics.plot({"Loss": ["train/loss"]}) is None
        assert metrics.position == 0
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_without_an_output_dir_it_only_shows(capsys):
    with writer(None) as metrics:
        metrics.log(1, {"train/loss": 1.0}, bar=["train/loss"])
        metrics.print("a sample")
        metrics.table("Results", [("loss", "1.0")], ("metric", "value"))
        assert metrics.plot({"Loss": ["train/loss"]}) is None
    out, err = capsys.readouterr()
    assert "a sample" in out and "Results" in out
    assert "loss 1" in err


def test_plot_draws_the_file(tmp_path):
    with writer(tmp_path) as metrics:
        metrics.log(1, {"train/loss": 1.0})
        assert metrics.plot({"Nothing": ["no/such"]}) is None
        path = metrics.plot({"Loss": ["train/loss"]})
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_tensorboard_gets_every_written_row(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writer(tmp_path / "output", enable_tensorboard=True, tensorboard_path=str(tmp_path / "board")) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"train/loss": step / 2})
    events = EventAccumulator(str(tmp_path / "board" / "sft"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_tensorboard_lies_in_the_output_dir_by_default(tmp_path):
    with writer(tmp_path, enable_tensorboard=True) as metrics:
        metrics.log(1, {"train/loss": 1.0})
    assert list((tmp_path / "tensorboard" / "sft").glob("events.*"))


def test_missing_tensorboard_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        writer(tmp_path, enable_tensorboard=True)


def test_tensorboard_without_a_folder_is_refused():
    with pytest.raises(InputError, match="--tensorboard_path"):
        writer(None, enable_tensorboard=True)


def test_a_full_disk_is_named(tmp_path):
    metrics = writer(tmp_path)
    with open("/dev/full", "ab", buffering=0) as metrics._file, pytest.raises(InputError, match="No space left"):
        metrics.log(1, {"train/loss": 1.0})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output_dir"):
        writer(tmp_path / "file" / "output")


def test_read_metrics_passes_over_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    assert read_metrics(path) == [{"step": 1, "a": 2}]


@pytest.mark.parametrize("line", ['{"step": 1, "a"', "[1, 2]", '{"a": 1}', ""])
def test_read_metrics_names_a_broken_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)


def test_read_metrics_of_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.jsonl")
