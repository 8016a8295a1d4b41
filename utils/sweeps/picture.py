"""The picture of a sweep: a line for one swept flag, a map for two, sorted dots for more."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic_path
from utils.output.curves import COLOURS
from utils.sweeps.grid import Sweep, show
from utils.sweeps.report import Outcome, ranked

LOGARITHMIC_FROM = 8.0  # ratio of the largest to the smallest value of a flag
MOST_DOTS = 40
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}


def draw_sweep(sweep: Sweep, outcomes: Sequence[Outcome], path: Path) -> Path | None:
    """Draw the metric of the runs over the swept flags as a PNG, written whole or not at all.

    Returns:
        The path, or None when no run has a finite metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [outcome for outcome in ranked(sweep, outcomes) if _is_measured(sweep, outcome)]
    if not measured:
        return None
    axes = {name: _distinct(outcome.values[name] for outcome in outcomes) for name in sweep.swept}
    axes = {name: values for name, values in axes.items() if len(values) > 1}
    figure = Figure(figsize=_size(axes, len(measured)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    if len(axes) == 1:
        _draw_line(axis, sweep, measured, *axes.items())
    elif len(axes) == 2 and _is_one_each(measured, list(axes)):
        _draw_map(figure, axis, sweep, measured, axes)
    else:
        _draw_dots(axis, sweep, measured, list(axes))
    best = "highest is best" if sweep.goal == "max" else "lowest is best"
    missing = len(outcomes) - len(measured)
    note = f"\n{missing} of {len(outcomes)} runs without a result" if missing else ""
    figure.suptitle(f"{sweep.step}: {sweep.metric} ({best}){note}", fontsize=12, fontweight="bold")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _is_measured(sweep: Sweep, outcome: Outcome) -> bool:
    return math.isfinite(outcome.numbers.get(sweep.metric, math.nan))


def _distinct(values) -> list[Any]:
    """In ascending order where they are numbers, else in the order in which they come."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return sorted(found) if _are_numbers(found) else found


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _is_one_each(measured: Sequence[Outcome], names: list[str]) -> bool:
    """Whether no two runs belong into the same field of a map."""
    places = [tuple(show(outcome.values[name]) for name in names) for outcome in measured]
    return len(set(places)) == len(places)


def _size(axes: dict[str, list[Any]], runs: int) -> tuple[float, float]:
    """Width and height in inches."""
    if len(axes) == 1:
        return 6.4, 4.2
    if len(axes) == 2:
        down, across = (len(values) for values in axes.values())
        return max(5.2, 2.4 + 1.15 * across), max(3.4, 1.7 + 0.6 * down)
    return 9.0, 1.6 + 0.28 * min(runs, MOST_DOTS)


def _draw_line(axis, sweep: Sweep, measured: Sequence[Outcome], flag: tuple[str, list[Any]]) -> None:
    name, values = flag
    numbers = _are_numbers(values)
    points = sorted(
        (outcome.values[name] if numbers else values.index(outcome.values[name]), outcome.numbers[sweep.metric])
        for outcome in measured
    )
    axis.plot(*zip(*points, strict=True), color=COLOURS[0], linewidth=1.6 if numbers else 0, marker="o", markersize=6)
    for x, y in points:
        if y == measured[0].numbers[sweep.metric]:
            axis.plot(x, y, marker="o", markersize=13, color=COLOURS[1], fillstyle="none", markeredgewidth=2)
        axis.annotate(f"{y:.4g}", (x, y), (0, 10), textcoords="offset points", ha="center", fontsize=9, bbox=ON_WHITE)
    if numbers and values[0] > 0 and values[-1] / values[0] >= LOGARITHMIC_FROM:
        axis.set_xscale("log")
    if numbers:
        axis.set_xticks(values, map(show, values))
        axis.minorticks_off()
    else:
        axis.set_xticks(range(len(values)), map(show, values))
    axis.margins(x=0.12, y=0.2)
    axis.set_xlabel(name)
    axis.set_ylabel(sweep.metric)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_map(figure, axis, sweep: Sweep, measured: Sequence[Outcome], axes: dict[str, list[Any]]) -> None:
    """Darker is better; the best, or all that are equally good, have a frame; a field without a result stays grey."""
    from matplotlib.patches import Rectangle

    (down, rows), (across, columns) = axes.items()
    cells = [[math.nan] * len(columns) for _ in rows]
    for outcome in measured:
        cells[rows.index(outcome.values[down])][columns.index(outcome.values[across])] = outcome.numbers[sweep.metric]
    axis.set_facecolor("#dddddd")
    image = axis.imshow(cells, cmap="Blues" if sweep.goal == "max" else "Blues_r", aspect="auto")
    low, high = image.get_clim()
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if math.isnan(value):
                axis.text(x, y, "–", ha="center", va="center", fontsize=11)
                continue
            share = (value - low) / (high - low) if high > low else 0.0
            dark = share > 0.6 if sweep.goal == "max" else share < 0.4 and high > low
            axis.text(x, y, f"{value:.4g}", ha="center", va="center", fontsize=11, color="white" if dark else "black")
            if value == measured[0].numbers[sweep.metric]:
                frame = {"fill": False, "edgecolor": COLOURS[1], "linewidth": 3, "zorder": 3}
                axis.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, **frame))
    axis.set_xticks([x + 0.5 for x in range(len(columns) - 1)], minor=True)
    axis.set_yticks([y + 0.5 for y in range(len(rows) - 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=3)
    axis.set_xticks(range(len(columns)), map(show, columns))
    axis.set_yticks(range(len(rows)), map(show, rows))
    axis.set_xlabel(across)
    axis.set_ylabel(down)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label=sweep.metric)


def _draw_dots(axis, sweep: Sweep, measured: Sequence[Outcome], names: list[str]) -> None:
    """The best run at the top; a label names the values of its flags."""
    shown = measured[:MOST_DOTS]
    cells = [[f"{name} {show(outcome.values[name])}" for name in names] for outcome in shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    labels = ["  ".join(map(str.ljust, row, widths)) for row in cells]
    numbers = [outcome.numbers[sweep.metric] for outcome in shown]
    places = range(len(shown))
    axis.plot(numbers, places, color=COLOURS[0], marker="o", markersize=7, linewidth=0)
    for x, y in zip(numbers, places, strict=True):
        if x == numbers[0]:
            axis.plot(x, y, marker="o", markersize=13, color=COLOURS[1], fillstyle="none", markeredgewidth=2)
        axis.annotate(f"{x:.4g}", (x, y), (10, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, labels, fontsize=8, family="monospace")
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.margins(x=0.15)
    axis.set_xlabel(
        sweep.metric + (f" (the best {len(shown)} of {len(measured)})" if len(shown) < len(measured) else "")
    )
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
