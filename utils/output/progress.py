"""Progress of a run on stderr: a bar on a terminal, an occasional plain line in a log file."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

# Seconds between plain lines: a twentieth of the time the run has taken, within these bounds. A one-minute run prints
# a line every five seconds, a day's run once a minute.
PLAIN_LINE_SECONDS = (5.0, 60.0)
SECONDS_BEFORE_A_BAR, SECONDS_BEFORE_A_LINE = 3.0, 10.0  # of work within a step
Piece = TypeVar("Piece")


def format_number(value: float) -> str:
    """Four significant digits, thousands separated: 0.6931, 12,345, 9.65e-06, nan."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


class Progress:
    """A bar that redraws itself. `Progress.start` chooses between this and `PlainProgress`."""

    def __init__(self, name: str, total_steps: int, start_step: int) -> None:
        self._bar = tqdm(
            desc=name,
            total=total_steps or None,
            initial=start_step,
            file=sys.stderr,
            unit="step",
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} {bar:20} {elapsed}<{remaining}{postfix}" if total_steps else None,
        )

    @staticmethod
    def start(name: str, total_steps: int, start_step: int = 0) -> "Progress | PlainProgress":
        """Begin at `start_step` of `total_steps` (0: unknown): a bar when stderr is a terminal, else plain lines."""
        return (Progress if _has_terminal() else PlainProgress)(name, total_steps, start_step)

    def update(self, step: int, fields: dict[str, float]) -> None:
        """Move to `step` and show `fields`; without fields those of the last call stay."""
        if fields:
            self._bar.set_postfix_str(_join(fields, " · "), refresh=False)
        self._bar.update(max(step - self._bar.n, 0))

    def print(self, text: str) -> None:
        """Write `text` to stdout above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Draw the last state and leave it on the screen."""
        self._bar.refresh()
        self._bar.close()


class Wait:
    """Progress of work within a step: nothing for a few seconds, then a bar, or lines in a log file.

    Args:
        what: such as "evaluating". total: number of pieces, None if unknown.
        is_main: other processes show nothing.
    """

    def __init__(self, what: str, total: int | None, *, is_main: bool) -> None:
        self._what, self._total, self._done = what, total, 0
        self._bar, self._shows_lines = None, is_main and not _has_terminal()
        self._started = self._time_of_line = time.monotonic()
        if is_main and not self._shows_lines:
            self._bar = tqdm(desc=what, total=total, delay=SECONDS_BEFORE_A_BAR, leave=False, file=sys.stderr)

    def update(self, count: int = 1) -> None:
        """Report that `count` more pieces are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shows_lines and count:
            now = time.monotonic()
            interval = min(max((now - self._started) / 5, SECONDS_BEFORE_A_LINE), PLAIN_LINE_SECONDS[1])
            if now - self._time_of_line >= interval:
                self._time_of_line = now
                total = f" of {self._total}" if self._total else ""
                elapsed = tqdm.format_interval(now - self._started)
                print(f"{self._what}: {self._done}{total}  {elapsed}", file=sys.stderr, flush=True)

    def over(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces; each counts as done when the next one is requested."""
        with self:
            for piece in pieces:
                yield piece
                self.update()

    def __enter__(self) -> "Wait":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


class PlainProgress:
    """One line for the first step, the last one, and in between every few seconds at most."""

    def __init__(self, name: str, total_steps: int, start_step: int) -> None:
        self._name, self._total_steps, self._start_step = name, total_steps, start_step
        self._step, self._step_of_line = start_step, start_step
        self._started = self._time_of_line = time.monotonic()
        self._fields: dict[str, float] = {}

    def update(self, step: int, fields: dict[str, float]) -> None:
        """Move to `step` and remember `fields`; write a line if one is due."""
        self._step, self._fields = max(self._step, step), fields or self._fields
        shortest, longest = PLAIN_LINE_SECONDS
        now = time.monotonic()
        interval = min(max((now - self._started) / 20, shortest), longest)
        first = self._step_of_line == self._start_step
        last = self._step == self._total_steps
        if self._step > self._step_of_line and (first or last or now - self._time_of_line >= interval):
            self._write_line()

    def print(self, text: str) -> None:
        """Write `text` to stdout."""
        print(text, flush=True)

    def close(self) -> None:
        """Write a last line if the run ended on a step that no line has shown."""
        if self._step > self._step_of_line:
            self._write_line()

    def _write_line(self) -> None:
        self._step_of_line, self._time_of_line = self._step, time.monotonic()
        elapsed = self._time_of_line - self._started
        if self._total_steps:
            left = elapsed / (self._step - self._start_step) * max(self._total_steps - self._step, 0)
            width = len(str(self._total_steps))
            position = f"{self._step:>{width}}/{self._total_steps} {100 * self._step // self._total_steps:>3}%"
            clock = f"{tqdm.format_interval(elapsed)}<{tqdm.format_interval(left)}"
        else:
            position, clock = str(self._step), tqdm.format_interval(elapsed)
        parts = [f"{self._name} {position}", clock, _join(self._fields, "  ")]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _has_terminal() -> bool:
    """True when stderr is a terminal that knows its size: tqdm draws nothing on one of zero columns (containers)."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _join(fields: dict[str, float], separator: str) -> str:
    return separator.join(f"{name} {format_number(value)}" for name, value in fields.items())
