"""The plot of a run's metrics: one panel per topic, raw values as a thin line under a smoothed one."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.files import atomic_path

# Okabe and Ito's palette without its yellow: distinct for colour-blind readers, and dark enough on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SPARSE_POINTS = 25


def draw_curves(
    rows: Sequence[Mapping[str, float | None]],
    panels: Mapping[str, Sequence[str]],
    path: str | os.PathLike,
    title: str,
    per: str = "step",
) -> Path | None:
    """Draw metrics over steps as a PNG.

    A series of more than `SPARSE_POINTS` values is drawn twice, raw and smoothed; a shorter one as marked points.
    Values that are missing or not finite leave a gap. A panel none of whose keys has a value is left out.

    Args:
        rows: as `metrics.read_metrics` returns them; a key need not be in every row.
        panels: title of each panel -> the keys it shows.
        path: the file, written whole or not at all.
        title: of the whole picture. per: what the horizontal axis counts.
    Returns:
        The path, or None when there was nothing to draw.
    """
    # matplotlib takes half a second to import, and the figure is built without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = {name: {key: _series(rows, key) for key in keys} for name, keys in panels.items()}
    drawn = {name: {key: xy for key, xy in series.items() if xy[0]} for name, series in drawn.items()}
    drawn = {name: series for name, series in drawn.items() if series}
    if not drawn:
        return None

    across = _panels_across(len(drawn))
    down = math.ceil(len(drawn) / across)
    figure = Figure(figsize=(4.8 * across, 3.2 * down + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, (name, series) in zip(axes, drawn.items(), strict=False):
        labels = _labels(list(series))
        for colour, (key, (steps, values)) in zip(_cycle(len(series)), series.items(), strict=True):
            _draw_series(axis, steps, values, labels[key], colour)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel(per, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axis.legend(fontsize=8, frameon=False)
        else:
            axis.set_ylabel(*labels.values(), fontsize=9)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _panels_across(count: int) -> int:
    """Up to three panels form one row and four a square; more are put three or four across, whichever leaves fewer
    gaps."""
    if count <= 4:
        return (1, 2, 3, 2)[count - 1]
    return min((3, 4), key=lambda across: -count % across)


def _labels(keys: list[str]) -> dict[str, str]:
    """The part of each key after the slash as words, or the whole key where two would read the same."""
    short = {key: key.rpartition("/")[2].replace("_", " ") for key in keys}
    names = list(short.values())
    return {key: name if names.count(name) == 1 else key for key, name in short.items()}


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _series(rows: Sequence[Mapping[str, float | None]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of `key`, nan for a value that was not finite; both empty when no value is finite."""
    found = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
    if not any(math.isfinite(value) for _, value in found):
        return [], []
    return [step for step, _ in found], [value for _, value in found]


def _draw_series(axis, steps: list[float], values: list[float], label: str, colour: str) -> None:
    if len(values) <= SPARSE_POINTS:
        axis.plot(steps, values, color=colour, label=label, linewidth=1.6, marker="o", markersize=3.5)
        return
    axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    axis.plot(steps, _smooth(values), color=colour, label=label, linewidth=1.8)


def _smooth(values: list[float]):
    """Gaussian average over about a twentieth of the series on either side. Centred, so that it does not lag behind;
    at the edges and around gaps the remaining weights are normalised."""
    import numpy as np

    raw = np.asarray(values, dtype=np.float64)
    sigma = max(len(raw) / 60, 1.0)
    offsets = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    finite = np.isfinite(raw)
    reach = len(offsets) // 2
    total = np.convolve(np.where(finite, raw, 0.0), kernel)[reach : reach + len(raw)]
    weight = np.convolve(finite.astype(np.float64), kernel)[reach : reach + len(raw)]
    smoothed = np.full_like(raw, np.nan)
    np.divide(total, weight, out=smoothed, where=finite)
    return smoothed
