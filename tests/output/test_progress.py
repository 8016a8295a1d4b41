"""A log file gets a few plain lines, a terminal gets a bar."""

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from utils.output import progress
from utils.output.progress import PlainProgress, Progress, Wait, format_number


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_fast_run_writes_its_first_and_last_line(capsys, clock):
    shown = Progress.start("sft", 5000)
    for step in range(1, 5001):
        shown.update(step, {"loss": 1 / step})
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["sft", "1/5000"], ["sft", "5000/5000"]]
    assert lines[-1].endswith("loss 0.0002")


def test_lines_come_every_few_seconds_and_further_apart_as_time_goes_by(capsys, clock):
    shown = Progress.start("ppo", 36_000)
    for step in range(1, 36_001):  # ten hours at a step per second
        clock[0] += 1
        shown.update(step, {"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps[:4] == [1, 6, 11, 16]
    assert steps[-1] == 36_000 and steps[-2] - steps[-3] == 60
    assert len(lines) < 700


def test_a_line_tells_position_time_and_fields(capsys, clock):
    shown = Progress.start("sft", 200)
    shown.update(1, {"loss": 2.0})
    clock[0] += 30
    shown.update(50, {"loss": 0.6931471, "tokens per s": 12345.6})
    out, err = capsys.readouterr()
    assert err.splitlines()[1] == "sft  50/200  25%  00:30<01:30  loss 0.6931  tokens per s 12,346"
    assert out == "" and "\r" not in err


def test_a_run_that_stops_early_still_writes_where_it_stopped(capsys, clock):
    shown = Progress.start("sft", 200)
    shown.update(1, {"loss": 2.0})
    shown.update(7, {})
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/200", "7/200"]
    assert lines[1].endswith("loss 2")  # the fields of the last row that had any


def test_results_logged_at_the_last_step_do_not_repeat_its_line(capsys, clock):
    shown = Progress.start("sft", 3)
    for step, fields in ((1, {"loss": 1.0}), (3, {"loss": 0.5}), (3, {})):
        shown.update(step, fields)
    shown.close()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_resumed_run_reckons_with_its_own_steps(capsys, clock):
    shown = Progress.start("sft", 200, start_step=100)
    clock[0] += 10
    shown.update(150, {})
    assert capsys.readouterr().err == "sft 150/200  75%  00:10<00:10\n"


def test_unknown_length(capsys, clock):
    Progress.start("sft", 0).update(12, {"loss": 1.0})
    assert capsys.readouterr().err == "sft 12  00:00  loss 1\n"


def start_on_terminal(columns, monkeypatch):
    """A progress display whose stderr is a terminal of `columns`, and the end from which its output can be read."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    monkeypatch.setattr(sys, "stderr", os.fdopen(terminal, "w"))
    return Progress.start("sft", 10), reader


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    shown, reader = start_on_terminal(120, monkeypatch)
    assert isinstance(shown, Progress)
    shown.update(4, {"loss": 0.5})
    shown.print("a sample")
    shown.close()
    drawn = os.read(reader, 10_000).decode()
    assert "\r" in drawn and "4/10" in drawn and "loss 0.5" in drawn
    assert capsys.readouterr().out == "a sample\n"
    sys.stderr.close()
    os.close(reader)


def test_a_terminal_without_a_size_gets_lines(monkeypatch):
    shown, reader = start_on_terminal(0, monkeypatch)
    assert isinstance(shown, PlainProgress)
    sys.stderr.close()
    os.close(reader)


@pytest.mark.parametrize(
    "value, text",
    [
        (0.69314718, "0.6931"),
        (9.65e-6, "9.65e-06"),
        (12345.6, "12,346"),
        (-4321, "-4,321"),
        (3, "3"),
        (1e15, "1e+15"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


def test_work_within_a_step_says_nothing_at_first_and_then_a_line_now_and_then(capsys, clock):
    with Wait("held-out rows", 100, is_main=True) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "held-out rows: 10 of 100  00:10" and 4 <= len(lines) <= 9
    assert list(Wait("rows", None, is_main=True).over("abc")) == ["a", "b", "c"]
    with Wait("rows", 100, is_main=False) as bar:
        clock[0] += 1000
        bar.update()
    assert capsys.readouterr().err == ""
