"""The picture of a run: right file, right panels, right lines."""

import math

import pytest
from matplotlib.axes import Axes

from utils.output.curves import _smooth, draw_curves


@pytest.fixture
def plotted(monkeypatch):
    """Arguments of every line drawn."""
    lines = []
    original = Axes.plot

    def plot(self, *args, **kwargs):
        lines.append((list(args[0]), list(args[1]), kwargs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)
    return lines


def test_short_series_are_marked_points(tmp_path, plotted):
    rows = [{"step": 0, "eval/loss": 3.0}, {"step": 50, "train/loss": 9.0}, {"step": 100, "eval/loss": 1.0}]
    assert draw_curves(rows, {"Held out": ["eval/loss"]}, tmp_path / "c.png", "sft") == tmp_path / "c.png"
    ((steps, values, style),) = plotted
    assert (steps, values) == ([0, 100], [3.0, 1.0])
    assert style["marker"] == "o" and style["label"] == "loss"


def test_long_series_are_drawn_raw_and_smoothed(tmp_path, plotted):
    rows = [{"step": step, "train/loss": (-1.0) ** step} for step in range(1, 201)]
    draw_curves(rows, {"Loss": ["train/loss"]}, tmp_path / "c.png", "sft")
    (_, raw, thin), (_, smooth, thick) = plotted
    assert raw == [row["train/loss"] for row in rows]
    assert max(map(abs, smooth[10:-10])) < 0.05
    assert thin["alpha"] < 1 and thin["linewidth"] < thick["linewidth"]


def test_values_that_are_not_finite_leave_a_gap(tmp_path, plotted):
    rows = [{"step": step, "loss": None if 40 <= step < 50 else 2.0} for step in range(100)]
    draw_curves(rows, {"Loss": ["loss"]}, tmp_path / "c.png", "sft")
    for _, values, _ in plotted:
        assert [step for step, value in enumerate(values) if math.isnan(value)] == list(range(40, 50))


def test_keys_of_the_same_name_keep_their_prefix(tmp_path, plotted):
    rows = [{"step": 1, "train/loss": 1.0, "eval/loss": 2.0, "train/grad_norm": 3.0}]
    draw_curves(rows, {"All": ["train/loss", "eval/loss", "train/grad_norm"]}, tmp_path / "c.png", "sft")
    assert [style["label"] for _, _, style in plotted] == ["train/loss", "eval/loss", "grad norm"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13])
def test_any_number_of_panels(tmp_path, count):
    rows = [{"step": 1, **{f"a/{i}": float(i) for i in range(count)}}]
    panels = {f"Panel {i}": [f"a/{i}"] for i in range(count)}
    path = draw_curves(rows, panels, tmp_path / "c.png", "many")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_writes_nothing(tmp_path):
    rows = [{"step": 1, "loss": None}]
    assert draw_curves(rows, {"Loss": ["loss"], "Other": ["no/such"]}, tmp_path / "c.png", "sft") is None
    assert draw_curves([], {"Loss": ["loss"]}, tmp_path / "c.png", "sft") is None
    assert list(tmp_path.iterdir()) == []


def test_smoothing_keeps_constants_to_the_edges():
    assert _smooth([3.0] * 100).tolist() == pytest.approx([3.0] * 100, abs=1e-12)


def test_smoothing_does_not_lag_behind():
    ramp = [float(i) for i in range(100)]
    assert _smooth(ramp)[50] == pytest.approx(50.0, abs=1e-9)
