"""The table of a sweep: its runs with their swept flags and numbers, the best first."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.files import atomic_write_text
from utils.output.tables import format_table
from utils.sweeps.grid import Sweep, show

TABLE_FILE, JSON_FILE, PICTURE_FILE = "sweep.md", "sweep.json", "sweep.png"
DEFAULT_COLUMNS = ("train_seconds",)
FINISHED, WAITING, FAILED, INTERRUPTED = "finished", "not run", "failed", "interrupted"


@dataclass(frozen=True)
class Outcome:
    """A run and what became of it.

    Attributes:
        values: swept flag -> its value.
        numbers: of its summary; empty unless it has finished.
        state: FINISHED, WAITING, FAILED or INTERRUPTED.
        command: what to type to run it alone.
        reason: why it failed.
    """

    name: str
    folder: Path
    log: Path
    values: dict[str, Any]
    numbers: dict[str, float]
    state: str
    command: str
    reason: str = ""


def ranked(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with the best metric first; those without a finite one last, in the sweep's order."""
    sign = -1 if sweep.goal == "max" else 1

    def key(outcome: Outcome) -> tuple[bool, float]:
        value = outcome.numbers.get(sweep.metric, math.nan)
        return (False, sign * value) if math.isfinite(value) else (True, 0.0)

    return sorted(outcomes, key=key)


def columns_of(sweep: Sweep) -> tuple[str, ...]:
    """The numbers to show: the metric and further ones."""
    return tuple(dict.fromkeys((sweep.metric, *(sweep.columns or DEFAULT_COLUMNS))))


def table_rows(sweep: Sweep, outcomes: Sequence[Outcome]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows, sorted by the metric."""
    columns = columns_of(sweep)
    header = ["", *sweep.swept, *columns, "state"]
    rows = []
    for place, outcome in enumerate(ranked(sweep, outcomes), start=1):
        has_rank = math.isfinite(outcome.numbers.get(sweep.metric, math.nan))
        rows.append(
            (
                str(place) if has_rank else "–",
                *(show(outcome.values[name]) for name in sweep.swept),
                *(_number(outcome.numbers.get(name)) for name in columns),
                outcome.state,
            )
        )
    return header, rows


def render_text(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """The table for a terminal."""
    header, rows = table_rows(sweep, outcomes)
    return format_table(f"{sweep.step}: {_order(sweep)}", rows, header)


def write_report(folder: Path, sweep: Sweep, outcomes: Sequence[Outcome], picture: bool) -> None:
    """Write the table as Markdown and all numbers as JSON.

    Args:
        picture: whether the Markdown shows the picture beside it.
    """
    atomic_write_text(folder / TABLE_FILE, render_markdown(sweep, outcomes, picture))
    content = {
        "step": sweep.step,
        "metric": sweep.metric,
        "goal": sweep.goal,
        "swept": list(sweep.swept),
        "runs": [
            {
                "name": outcome.name,
                "folder": str(outcome.folder),
                "log": str(outcome.log),
                "state": outcome.state,
                "reason": outcome.reason,
                "flags": outcome.values,
                "numbers": {k: v if math.isfinite(v) else None for k, v in outcome.numbers.items()},
                "command": outcome.command,
            }
            for outcome in ranked(sweep, outcomes)
        ],
    }
    atomic_write_text(folder / JSON_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def render_markdown(sweep: Sweep, outcomes: Sequence[Outcome], picture: bool) -> str:
    """The table, the picture, the command of the best run, and why runs failed."""
    header, rows = table_rows(sweep, outcomes)
    lines = [f"# Sweep of {sweep.step}", "", f"Runs by {_order(sweep)}.", ""]
    lines += [_markdown_row(header), _markdown_row(["---"] * len(header)), *map(_markdown_row, rows), ""]
    if picture:
        lines += [f"![{sweep.metric} of the runs]({PICTURE_FILE})", ""]
    best = ranked(sweep, outcomes)[0]
    if math.isfinite(best.numbers.get(sweep.metric, math.nan)):
        lines += [f"The best run is in `{best.folder}`:", "", "```bash", best.command, "```", ""]
    failed = [outcome for outcome in outcomes if outcome.state not in (FINISHED, WAITING)]
    lines += [f"- {outcome.name}: {outcome.reason or outcome.state}; log: `{outcome.log}`" for outcome in failed]
    return "\n".join(lines).rstrip() + "\n"


def _order(sweep: Sweep) -> str:
    return f"{sweep.metric}, {'highest' if sweep.goal == 'max' else 'lowest'} first"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
