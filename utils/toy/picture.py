"""One figure about a run in the small world: judge scores, rewards, and where the two diverge."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.files import atomic_path
from utils.toy.report import KINDS, MAX_SFT_JUDGE, MIN_JUDGE, MIN_REWARD_ACCURACY, Examination, mean_judge

Metrics = Sequence[Mapping[str, float | None]]

# Okabe and Ito's palette: distinct for colour-blind readers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
MODEL_COLOURS = {"base": GREY, "SFT": ORANGE}  # the aligned one is blue
KIND_COLOURS = dict(zip(KINDS, (BLUE, "#56B4E9", "#E5C95F", "#E69F00", PURPLE, ORANGE, GREY), strict=True))


def draw_picture(
    path: str | os.PathLike,
    models: Sequence[Examination],
    ppo_metrics: Metrics,
    reward_metrics: Metrics,
    rollout_judge: Sequence[tuple[float, float]],
) -> None:
    """Write the picture of a run with PPO as a PNG.

    Args:
        models: base, SFT and PPO.
        ppo_metrics, reward_metrics: rows of the `metrics.jsonl` of steps 3 and 2.
        rollout_judge: (iteration, judge score) of answers that PPO sampled while it trained.
    """
    with _figure(path, models) as axes:
        _reward_by_kind(axes[0, 2], models)
        _judge_against_reward(axes[1, 0], ppo_metrics, rollout_judge)
        _drift(axes[1, 1], ppo_metrics)
        _reward_training(axes[1, 2], reward_metrics)


def draw_direct_picture(path: str | os.PathLike, models: Sequence[Examination], metrics: Metrics) -> None:
    """Write the picture of a run with direct preference optimisation as a PNG.

    Args:
        models: base, SFT and the aligned one. metrics: rows of its `metrics.jsonl`.
    """
    panels = (
        ("Which answer is the better one?", "accuracy", {"train/accuracy": GREY, "eval/accuracy": BLUE}),
        ("Implied rewards of held-out answers", "reward", {"eval/chosen_reward": BLUE, "eval/rejected_reward": ORANGE}),
        (
            "Do good answers stay likely?",
            "log-probability of held-out answers",
            {"eval/chosen_logprob": BLUE, "eval/rejected_logprob": ORANGE},
        ),
        ("How far the model moves", "KL(SFT || model), nats per answer", {"eval/kl": PURPLE}),
    )
    with _figure(path, models) as axes:
        for axis, (title, unit, lines) in zip((axes[0, 2], *axes[1]), panels, strict=True):
            for key, colour in lines.items():
                steps, values = _series(metrics, key)
                marker = "o" if key.startswith("eval/") else ""
                axis.plot(steps, values, color=colour, marker=marker, linewidth=1.6, label=key)
            axis.set_xlabel("optimiser step")
            axis.set_ylabel(unit)
            axis.legend(fontsize=9, frameon=False)
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines["right"].set_visible(False)
            axis.set_title(title, fontsize=12)


@contextlib.contextmanager
def _figure(path: str | os.PathLike, models: Sequence[Examination]) -> Iterator[np.ndarray]:
    """(2, 3) axes, of which the first two show the judge's scores; written to `path` at the end of the block."""
    figure = Figure(figsize=(15.6, 8.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.04)
    figure.suptitle("From a base model to an aligned one in a small world", fontsize=15, fontweight="bold")
    axes = figure.subplots(2, 3)
    _judge_bars(axes[0, 0], models)
    _kinds(axes[0, 1], models)
    yield axes
    for axis in axes.flat:
        axis.spines["top"].set_visible(False)
        axis.tick_params(labelsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _judge_bars(axis: Axes, models: Sequence[Examination]) -> None:
    width = 0.36
    places = np.arange(len(models))
    colours = [MODEL_COLOURS.get(model.name, BLUE) for model in models]
    for way, offset, opacity in (("greedy", -width / 2, 1.0), ("sampled", width / 2, 0.55)):
        scores = [mean_judge(getattr(model, way)) for model in models]
        bars = axis.bar(places + offset, scores, width * 0.94, color=colours, alpha=opacity)
        for bar, score in zip(bars, scores, strict=True):
            middle = bar.get_x() + bar.get_width() / 2
            axis.text(middle, 0.015, way, ha="center", va="bottom", fontsize=8, color="black", alpha=0.8)
            axis.text(
                *(middle, score + 0.02, f"{score:.2f}"),
                **{"ha": "center", "va": "bottom", "fontsize": 10, "fontweight": "bold", "zorder": 5},
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
    for place, bound, words in ((1, MAX_SFT_JUDGE, "at most"), (2, MIN_JUDGE[models[-1].name], "at least")):
        axis.hlines(bound, place - 0.42, place + 0.42, color="black", linewidth=1.3, linestyle="--")
        axis.text(place - 0.44, bound, f"{words} {bound:.2f}", fontsize=9, ha="right", va="center")
    axis.set_xticks(places, [model.name for model in models], fontsize=11)
    axis.set_ylim(0, 1.12)
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.set_ylabel("judge score, 0 to 1")
    axis.spines["right"].set_visible(False)
    axis.set_title("The judge on held-out questions", fontsize=12)


def _kinds(axis: Axes, models: Sequence[Examination]) -> None:
    left = np.zeros(len(models))
    for kind in KINDS:
        shares = np.array([model.numbers()["kinds_sampled"][kind] for model in models])
        bars = axis.barh(
            range(len(models)), shares, left=left, height=0.62, color=KIND_COLOURS[kind], label=kind.replace("_", " ")
        )
        axis.bar_label(
            bars,
            [f"{share:.0%}" if share >= 0.06 else "" for share in shares],
            label_type="center",
            fontsize=9,
            color="white" if kind in ("helpful", "rude", "wrong", "noise") else "black",
        )
        left += shares
    axis.set_yticks(range(len(models)), [model.name for model in models], fontsize=11)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(fontsize=9, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.09))
    axis.spines["right"].set_visible(False)
    axis.set_title("What kind of answers they sample", fontsize=12)


def _reward_by_kind(axis: Axes, models: Sequence[Examination]) -> None:
    """Every sampled answer as a dot: a reward model that can be hacked gives some bad kind a high reward."""
    scatter = np.random.default_rng(0)
    for model in models:
        for place, kind in enumerate(KINDS):
            rewards = np.array([answer.reward for answer in model.sampled if answer.verdict.kind == kind])
            heights = place + scatter.uniform(-0.3, 0.3, len(rewards))
            label = model.name if place == 0 else None
            axis.scatter(
                rewards, heights, s=11, alpha=0.5, color=MODEL_COLOURS.get(model.name, BLUE), linewidths=0, label=label
            )
    for place, kind in enumerate(KINDS):
        rewards = [answer.reward for model in models for answer in model.sampled if answer.verdict.kind == kind]
        if rewards:
            axis.plot([np.mean(rewards)] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.6)
    axis.set_yticks(range(len(KINDS)), [kind.replace("_", " ") for kind in KINDS])
    axis.set_ylim(len(KINDS) - 0.5, -0.5)
    axis.set_xlabel("reward, standard deviations (black: mean)")
    axis.legend(fontsize=9, frameon=False, markerscale=2)
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines["right"].set_visible(False)
    axis.set_title("What the reward model thinks of each kind", fontsize=12)


def _judge_against_reward(axis: Axes, metrics: Metrics, rollout_judge: Sequence[tuple[float, float]]) -> None:
    iterations, rewards = _series(metrics, "ppo/score_normalized")
    reward_axis = axis.twinx()
    (reward_line,) = reward_axis.plot(iterations, rewards, color=GREEN, linewidth=1.8, label="reward")
    reward_axis.set_ylabel("mean reward, standard deviations", color=GREEN)
    reward_axis.spines["top"].set_visible(False)
    lines = [reward_line]
    if rollout_judge:
        judged = np.array(rollout_judge)
        places = np.unique(judged[:, 0])
        width = max(1.0, len(places) / 20)
        weights = np.exp(-0.5 * ((places[:, None] - judged[None, :, 0]) / width) ** 2)
        smooth = (weights * judged[:, 1]).sum(1) / weights.sum(1)
        jitter = np.random.default_rng(0).uniform(-0.018, 0.018, len(judged))
        axis.scatter(judged[:, 0], judged[:, 1] + jitter, s=9, alpha=0.3, color=BLUE, linewidths=0)
        lines += axis.plot(places, smooth, color=BLUE, linewidth=2.2, label="judge")
    axis.set_ylim(-0.04, 1.04)
    axis.set_xlabel("PPO iteration")
    axis.set_ylabel("judge score of sampled answers", color=BLUE)
    axis.legend(handles=lines, fontsize=9, frameon=False, loc="lower right")
    axis.set_title("Is the reward earned? Judge against reward", fontsize=12)


def _drift(axis: Axes, metrics: Metrics) -> None:
    kl_line = axis.plot(*_series(metrics, "ppo/kl_k1"), color=PURPLE, linewidth=1.8, label="KL to SFT")
    axis.set_xlabel("PPO iteration")
    axis.set_ylabel("nats per answer", color=PURPLE)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    entropy_axis = axis.twinx()
    entropy_line = entropy_axis.plot(
        *_series(metrics, "ppo/entropy"), color=GREY, linewidth=1.8, label="entropy of the policy"
    )
    entropy_axis.set_ylabel("nats per token", color="#666666")
    entropy_axis.set_ylim(bottom=0)
    entropy_axis.spines["top"].set_visible(False)
    axis.legend(handles=[*kl_line, *entropy_line], fontsize=9, frameon=False)
    axis.set_title("How far PPO moves", fontsize=12)


def _reward_training(axis: Axes, metrics: Metrics) -> None:
    steps, accuracies = _series(metrics, "train/accuracy")
    axis.plot(steps, accuracies, color=ORANGE, linewidth=0.8, alpha=0.3)
    width = max(1, len(accuracies) // 20)
    if len(accuracies) >= width:
        smooth = np.convolve(accuracies, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth, color=ORANGE, linewidth=1.8, label="training pairs")
    steps, accuracies = _series(metrics, "eval/accuracy")
    axis.plot(steps, accuracies, "o", color="black", markersize=6, label="held-out pairs")
    for step, accuracy in zip(steps, accuracies, strict=True):
        axis.annotate(
            f"{accuracy:.2f}", (step, accuracy), textcoords="offset points", xytext=(0, -14), ha="center", fontsize=9
        )
    axis.axhline(MIN_REWARD_ACCURACY, color="black", linewidth=1.2, linestyle="--")
    axis.set_ylim(0.35, 1.03)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("accuracy")
    axis.legend(fontsize=9, frameon=False, loc="lower right")
    axis.spines["right"].set_visible(False)
    axis.set_title(f"The reward model learns (held out: at least {MIN_REWARD_ACCURACY:.2f})", fontsize=12)


def _series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key`."""
    found = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float)
