"""The output of a benchmark: tables on the terminal, and a section of RESULTS.md that also describes the machine."""

import datetime
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from scripts.benchmarks import machine
from utils.arguments import Arguments, flag
from utils.files import atomic_write_text
from utils.output.tables import format_table

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
HEADING = "# Results\n\nEach section was appended by one run of the script that it names.\n"
LIBRARIES = ("torch", "transformers", "deepspeed")
MEMORY = "GiB"  # the measure that all contenders have


@dataclass(kw_only=True)
class ReportArguments(Arguments):
    """The report."""

    repeats: int = flag(3, "repetitions, interleaved; medians are reported", at_least=1)
    results: str = flag(str(RESULTS), "file that a section with the results is appended to; empty = none")


def median(values: Sequence[float], digits: int = 2) -> str:
    """The median, followed by the range if there are several values: `2.31 (2.25 to 2.40)`."""
    middle = f"{statistics.median(values):,.{digits}f}"
    spread = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else ""
    return middle + spread


def ratios(measured: Mapping[str, Mapping], speed: str, *, higher_is_faster: bool) -> list[tuple[str, ...]]:
    """Ratios of medians, as rows (contender of ours, peer, how many times as fast, share of its memory).

    Args:
        measured: name -> measure -> its values; the names of our own contenders begin with "ours".
        speed: the measure to compare.
    """
    rows = []
    for mine in (name for name in measured if name.startswith("ours")):
        for peer in (name for name in measured if not name.startswith("ours")):
            fast, memory = (
                statistics.median(measured[mine][measure]) / statistics.median(measured[peer][measure])
                for measure in (speed, MEMORY)
            )
            rows.append((mine, peer, f"{fast if higher_is_faster else 1 / fast:.2f}", f"{memory:.2f}"))
    return rows


class Report:
    """The tables of one run, printed as they come and appended to the results file at the end."""

    def __init__(self, work: str, versions: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """
        Args:
            work: what was measured, in a line.
            versions: library versions of each peer.
        """
        self.work, self.versions = work, dict(versions or {})
        self.parts: list[str] = []

    def table(self, title: str, rows: Sequence[tuple[str, ...]], header: Sequence[str]) -> None:
        """Print a table and keep it."""
        print(f"\n{format_table(title, rows, header)}", flush=True)
        lines = [tuple(header), ("---",) * len(header), *rows]
        self.parts.append(f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))

    def compare(
        self, measured: Mapping[str, Mapping], speed: str, *, higher_is_faster: bool = True, note: str = ""
    ) -> None:
        """Add the table of `ratios` and a note below it, if both contenders of ours and peers have run."""
        if rows := ratios(measured, speed, higher_is_faster=higher_is_faster):
            self.table("Ratios of medians", rows, ("ours", "peer", "times as fast", "share of its memory"))
            if note:
                self.remark(note)

    def remark(self, text: str) -> None:
        """Print a line and keep it."""
        print(text, flush=True)
        self.parts.append(f"{text}\n")

    def close(self, path: str) -> None:
        """Append the section to the file at `path`, which is created if missing; an empty path appends nothing."""
        own = {"Python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
        libraries = {"ours": own, **self.versions}
        named = [
            f"{name}: " + ", ".join(f"{library} {number}" for library, number in numbers.items())
            for name, numbers in libraries.items()
        ]
        script = Path(sys.argv[0]).name
        facts = [machine.describe(), *named, self.work]
        print("\n" + "\n".join(facts), flush=True)
        if not path:
            return
        heading = f"## {script}, {datetime.date.today().isoformat()}\n"
        section = "\n".join([heading, *(f"- {fact}" for fact in facts), "", *self.parts])
        before = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else HEADING
        atomic_write_text(path, f"{before.rstrip()}\n\n{section}")
        print(f"appended to {path}", flush=True)
