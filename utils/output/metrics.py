"""What a run shows and writes: progress, one JSON-lines file, TensorBoard on request, tables, curves.

`metrics.jsonl` holds one object per line, `{"step": 12, "time": 1718000000.0, "train/loss": 2.31, ...}`. Every line is
passed to the operating system whole and without buffering, so a killed run keeps all it has logged. NaN and infinities,
which JSON does not have, are written as null.
"""

import importlib.util
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from utils.errors import InputError, RankError
from utils.files import make_writable
from utils.output.curves import draw_curves
from utils.output.progress import Progress
from utils.output.tables import format_table, printable

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


class MetricsWriter:
    """Everything a step reports goes through one of these; on ranks other than the main one all methods do nothing.

    Args:
        output_dir: folder of `metrics.jsonl` and `curves.png`, made if missing; None writes no files.
        job_name: label of the progress bar, the TensorBoard run and the picture.
        total_steps: length of the run in steps, 0 if unknown.
        is_main: true on the one rank that writes.
        enable_tensorboard: also write every row as TensorBoard scalars to `tensorboard_path`/`job_name`.
        tensorboard_path: empty means `output_dir`/tensorboard.
        logging_interval: of the rows that move the progress bar, the file gets those of every n-th step.
        start_step: the step a resumed run continues from.
        position: a resumed run keeps this many bytes of the existing `metrics.jsonl` (see the property of the same
            name) and drops what was logged after its checkpoint; 0 starts with an empty file.
    Raises:
        InputError: tensorboard is not installed or has no folder to write to; a folder cannot be written.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike | None,
        *,
        job_name: str,
        total_steps: int,
        is_main: bool,
        enable_tensorboard: bool = False,
        tensorboard_path: str = "",
        logging_interval: int = 1,
        start_step: int = 0,
        position: int = 0,
    ) -> None:
        self._is_main = is_main
        self._output_dir = Path(output_dir) if output_dir else None
        self._job_name, self._total_steps = job_name, total_steps
        self._logging_interval = max(logging_interval, 1)
        self._held_row: tuple[int, dict[str, float]] | None = None
        self._file, self._tensorboard, self._progress = None, None, None
        if not is_main:
            return
        if enable_tensorboard:
            self._tensorboard = self._open_tensorboard(tensorboard_path, start_step)
        if self._output_dir is not None:
            self._file = _open_at(self._output_dir / METRICS_FILE, position)
        self._progress = Progress.start(job_name, total_steps, start_step)

    @property
    def position(self) -> int:
        """Bytes of `metrics.jsonl` written so far, to be kept with a checkpoint; 0 without a file."""
        return self._file.tell() if self._file is not None else 0

    def log(self, step: int, metrics: Mapping[str, float], bar: Iterable[str] = ()) -> None:
        """Record the metrics of a step.

        A row with `bar` keys reports progress: those keys are shown beside the bar, and the row is kept on the first
        step, the last one and every `logging_interval`-th. A row without is a result (an evaluation), always kept.

        Args:
            step: counted from 1; 0 for what is measured before training. May repeat.
            metrics: keys like "train/loss", "eval/perplexity", "ppo/kl", "time/rollout"; numbers or one-element
                tensors.
            bar: keys of `metrics` to show, by the part after the slash.
        """
        if not self._is_main:
            return
        values = {key: _number(value) for key, value in metrics.items()}
        shown = [key for key in bar if key in values]
        self._progress.update(step, {key.rpartition("/")[2].replace("_", " "): values[key] for key in shown})
        due = step % self._logging_interval == 0 or step <= 1 or step >= self._total_steps > 0
        if due or not shown:
            self._write_row(step, values)
            if shown:
                self._held_row = None
        else:
            self._held_row = step, values

    def print(self, text: str) -> None:
        """Print to stdout without breaking the bar."""
        if self._is_main:
            self._progress.print(printable(text))

    def table(self, title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str]) -> None:
        """Print an aligned table, see `tables.format_table`."""
        if self._is_main:
            self._progress.print(f"\n{format_table(title, rows, header)}\n")

    def compare(self, title: str, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Print "eval/..." metrics from before and after side by side, named by the part after "eval/"."""
        rows = [(name.partition("/")[2], f"{before[name]:.4f}", f"{after[name]:.4f}") for name in after]
        self.table(title, rows, header=("", "before", "after"))

    def plot(self, panels: Mapping[str, Sequence[str]], per: str = "step") -> Path | None:
        """Draw `output_dir`/curves.png from metrics.jsonl: title of each panel -> the keys it shows.

        Args:
            per: what the steps of this job are called.

        Returns:
            The picture's path; None when there is no file or none of the keys was logged.
        """
        if self._file is None:
            return None
        rows = read_metrics(self._output_dir / METRICS_FILE)
        return draw_curves(rows, panels, self._output_dir / CURVES_FILE, self._job_name, per)

    def close(self) -> None:
        """Write the last row if `logging_interval` held it back, finish the bar, close the files. Safe to repeat."""
        if self._held_row is not None:
            self._write_row(*self._held_row)
            self._held_row = None
        for opened in (self._progress, self._tensorboard, self._file):
            if opened is not None:
                opened.close()
        self._is_main, self._file, self._tensorboard, self._progress = False, None, None, None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_row(self, step: int, values: dict[str, float]) -> None:
        if self._file is not None:
            finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
            row = {"step": step, "time": round(time.time(), 3), **finite}
            try:
                self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            except OSError as error:
                raise RankError(f"--output_dir: cannot write {METRICS_FILE}: {error.strerror or error}") from error
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)

    def _open_tensorboard(self, tensorboard_path: str, start_step: int):
        folder = check_tensorboard(tensorboard_path, self._output_dir) / self._job_name
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None, flush_secs=10)


def check_tensorboard(tensorboard_path: str, output_dir: str | os.PathLike | None) -> Path:
    """The folder for TensorBoard's files, created if missing.

    Raises:
        InputError: none is given, it cannot be written, or TensorBoard is not installed.
    """
    if not tensorboard_path and not output_dir:
        raise InputError("--enable_tensorboard needs a folder: give --tensorboard_path or --output_dir")
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("--enable_tensorboard needs TensorBoard: run `pip install tensorboard`")
    folder = Path(tensorboard_path or Path(output_dir) / "tensorboard")
    try:
        make_writable(folder)
    except OSError as error:
        raise InputError(f"--tensorboard_path: cannot write to {folder}: {error.strerror or error}") from error
    return folder


def read_metrics(path: str | os.PathLike, *, end: int | None = None) -> list[dict[str, float | None]]:
    """The rows of a `metrics.jsonl`, in order; null becomes None. An incomplete last line is skipped.

    Args:
        end: number of bytes of the file to read; if omitted, all.

    Raises:
        InputError: the file cannot be read, or another line is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes()[:end].decode("utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text (byte {error.start + 1}); remove everything from there on") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or "step" not in row:
            raise InputError(f"{path}, line {number}: expected an object with a step")
        rows.append(row)
    return rows


def _open_at(path: Path, position: int):
    """Open `path` unbuffered for appending after its first `position` bytes; anything later is dropped."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by MetricsWriter.close)
    except OSError as error:
        raise RankError(f"--output_dir: cannot write {path}: {error.strerror or error}") from error
    file.truncate(min(position, file.seek(0, os.SEEK_END)))
    file.seek(0, os.SEEK_END)
    return file


def _number(value: float) -> float:
    """A python number from a number or a one-element tensor; integers stay integers."""
    return int(value) if isinstance(value, int) else float(value)
