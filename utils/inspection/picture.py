"""The picture of an inspection: where the rows went, their lengths, what is cut, length bias, duplicates."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.data.rows.token_rows import LEFT_OUT
from utils.files import atomic_path
from utils.inspection.measures import ANSWERS, Inspection
from utils.output.curves import COLOURS

BLUE, RED, GREEN, _, SKY, AMBER, BLACK = COLOURS
GREY = "#999999"
# Of a pair and of labels the good answer is green and the bad one red, everywhere in the picture.
PART_COLOURS = {"prompt": BLUE, "response": GREEN, "chosen": GREEN, "rejected": RED}
SHOWN_SHARE = 99.5  # percent of the rows that a histogram shows; the longest would flatten all others


def draw_inspection(inspection: Inspection, path: str | os.PathLike, title: str) -> Path:
    """Draw the panels as a PNG, which is written whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[Callable] = [_draw_rows, _draw_lengths, _draw_duplicates, _draw_cut]
    if inspection.length_bias():  # one more column; bars stay in the first one, which has room for their names
        bias = _draw_pairs if inspection.labels is None else _draw_labels
        panels = [_draw_rows, _draw_lengths, _draw_cut, _draw_duplicates, bias]
    across = 3 if len(panels) > 4 else 2
    figure = Figure(figsize=(4.8 * across, 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots(2, across, squeeze=False).flatten()
    for axis, draw in zip(axes, panels, strict=False):
        draw(axis, inspection)
        axis.title.set_fontsize(11)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_fontsize(9)
        axis.yaxis.label.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return Path(path)


def _draw_rows(axis, inspection: Inspection) -> None:
    """What became of the rows that were read, over all sources."""
    report = inspection.train.report
    sources = report["sources"]
    bars = {
        "read": (sum(source["rows"] for source in sources), BLACK),
        "of other steps": (sum(sum(source["divided"].values()) - source["this_step"] for source in sources), GREY),
        "held-out rows": (report.get("held_out_rows", len(inspection.held_out)), SKY),
        "training rows": (report.get("training_rows", len(inspection.train)), GREEN),
        "left out by filters": (sum(sum(source.get("filtered", {}).values()) for source in sources), RED),
        "unusable": (sum(sum(source.get("unusable", {}).values()) for source in sources), AMBER),
    }
    forms = [item for source in sources for item in source.get("form", {}).items()]
    others = {
        "not in the template's form": sum(count for reason, count in forms if reason.startswith(LEFT_OUT)),
        "repeated prompts": report.get("repeated_prompts", 0),
    }
    bars |= {name: (count, GREY) for name, count in others.items() if count}
    _bars(axis, bars)
    axis.set_title("what became of the rows")
    axis.set_xlabel("rows")


def _draw_duplicates(axis, inspection: Inspection) -> None:
    found = inspection.duplicates
    bars = {
        "training row, exactly": (found.exact_in_training, BLUE),
        "training row, nearly": (found.near_in_training, SKY),
        "held-out row, exactly": (found.exact_of_held_out, RED),
        "held-out row, nearly": (found.near_of_held_out, AMBER),
    }
    _bars(axis, bars, of=len(inspection.totals))
    axis.set_title("training rows that repeat another row")
    axis.set_xlabel("training rows (nearly includes exactly)")


def _bars(axis, bars: dict[str, tuple[int | None, str]], of: int | None = None) -> None:
    names, values = list(bars), [value or 0 for value, _ in bars.values()]
    places = np.arange(len(names))[::-1]
    axis.barh(places, values, color=[colour for _, colour in bars.values()], height=0.65)
    for place, (value, _) in zip(places, bars.values(), strict=True):
        share = f" ({value / of:.1%})" if of and value is not None else ""
        text = "unknown: pip install rensa" if value is None else f"{value:,}{share}"
        axis.annotate(text, (value or 0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, names)
    axis.set_xlim(0, max(*values, 1) * 1.35)
    axis.locator_params(axis="x", nbins=5, integer=True)


def _histogram(axis, series: dict[str, tuple[np.ndarray, str]]) -> None:
    """Shares of each series in common bins, as outlines over a light filling; the median in the legend."""
    end = max(np.percentile(values, SHOWN_SHARE) for values, _ in series.values())
    bins = np.linspace(0, max(end, 10), min(41, int(max(end, 10)) + 1))
    for name, (values, colour) in series.items():
        label, weights = f"{name}, median {np.median(values):,.0f}", np.full(len(values), 100 / len(values))
        axis.hist(values, bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.15)
        axis.hist(values, bins, weights=weights, histtype="step", color=colour, linewidth=1.6, label=label)
    axis.set_xlabel("tokens")
    axis.set_ylabel("percent of the rows")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(fontsize=8, frameon=False)


def _draw_lengths(axis, inspection: Inspection) -> None:
    # A prompt that is BOS alone belongs to plain text, and says nothing.
    series = {name: (values, PART_COLOURS[name]) for name, values in inspection.lengths.items() if values.max() > 1}
    if any(name in series for name in ANSWERS):
        series["total"] = (inspection.totals, BLACK)
    _histogram(axis, series)
    axis.set_title("lengths before anything is cut")


def _draw_cut(axis, inspection: Inspection) -> None:
    totals, limit = np.sort(inspection.totals), inspection.max_len
    end = max(1.3 * limit, 1.1 * float(np.percentile(totals, SHOWN_SHARE)))
    limits = np.linspace(1, end, 400)
    shares = 100 * (1 - np.searchsorted(totals, limits, side="right") / len(totals))
    axis.plot(limits, shares, color=BLUE, linewidth=1.8)
    axis.axvline(limit, color=RED, linewidth=1.2, linestyle="--")
    share = inspection.share_cut(limit)
    right = limit < 0.6 * end
    axis.annotate(
        f"{share:.1%} at {limit:,}",
        (limit, 88),
        xytext=(5 if right else -5, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        color=RED,
        fontsize=9,
    )
    axis.plot([limit], [100 * share], "o", color=RED, markersize=5)
    axis.set_ylim(-2, 102)
    axis.set_xlim(0, end)
    axis.set_title("rows that are too long, by limit")
    axis.set_xlabel(f"{inspection.length_flag} (tokens)")
    axis.set_ylabel("percent of the rows")
    axis.grid(alpha=0.25, linewidth=0.6)


def _draw_pairs(axis, inspection: Inspection) -> None:
    """Density of pairs over both lengths; above the diagonal the chosen response is the longer one."""
    chosen, rejected = inspection.lengths["chosen"], inspection.lengths["rejected"]
    end = max(np.percentile(values, SHOWN_SHARE) for values in (chosen, rejected)) + 1
    bins = np.linspace(0, max(end, 10), min(41, int(max(end, 10)) + 1))
    counts, _, _ = np.histogram2d(rejected, chosen, bins=(bins, bins))
    shown = np.ma.masked_equal(counts.T, 0)
    mesh = axis.pcolormesh(bins, bins, shown, cmap="viridis_r", norm="log" if counts.max() > 20 else None)
    bar = axis.figure.colorbar(mesh, ax=axis, shrink=0.85, format="%d")
    bar.set_label("pairs", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    axis.plot([0, bins[-1]], [0, bins[-1]], color=GREY, linewidth=1, linestyle="--")
    axis.set_aspect("equal")
    bias = inspection.length_bias()
    axis.set_title(_bias_title("chosen", bias))
    axis.set_xlabel("tokens of the rejected response")
    axis.set_ylabel("tokens of the chosen response")


def _draw_labels(axis, inspection: Inspection) -> None:
    lengths, labels = inspection.lengths["response"], inspection.labels
    _histogram(axis, {"desirable": (lengths[labels], GREEN), "undesirable": (lengths[~labels], RED)})
    bias = inspection.length_bias()
    axis.set_title(_bias_title("desirable", bias))


def _bias_title(good: str, bias: dict[str, float]) -> str:
    by = f"(by {bias['mean_difference']:+.1f} tokens on average)"
    return f"length bias: {good} is longer in {bias['longer']:.0%} of the pairs\n{by}"
