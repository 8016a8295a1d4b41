"""Step 2 end to end: additions to the loss, several epochs, several data sets, and heads with a hidden layer."""

import json
from pathlib import Path

import pytest
from step_scripts import flags, load_step, run_step, write_rows

from utils.arguments import run
from utils.output.metrics import read_metrics


def rows_of(world) -> list[dict]:
    return [json.loads(line) for line in Path(world["data"]).read_text().splitlines()]


def training_losses(output) -> list[float]:
    return [row["train/loss"] for row in read_metrics(output / "metrics.jsonl") if "train/loss" in row]


def refused(argv: list[str], capsys) -> str:
    """The line on stderr of a run that is refused."""
    script = load_step(2)
    with pytest.raises(SystemExit) as stop:
        run(script.main, script.Config, argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("reward_loss", ["last_token", "token_span"])
def test_a_column_of_equal_margins_is_the_constant_margin(world, tmp_path, reward_loss):
    data = write_rows(tmp_path / "pairs.jsonl", [row | {"strength": 1.5} for row in rows_of(world)])
    common = {"max_steps": 3, "reward_loss": reward_loss, "data_path": [data]}
    options = {"plain": {}, "constant": {"margin": 1.5}, "column": {"margin_column": "strength"}}
    for name, changes in options.items():
        run_step(2, flags(world, 2, tmp_path / name, **common, **changes))
    plain, constant, column = (training_losses(tmp_path / name) for name in options)
    assert column == constant and constant[0] > plain[0] + 0.3


def test_centring_moves_scores_towards_zero_and_smoothing_limits_confidence(world, tmp_path):
    summaries = {
        name: run_step(2, flags(world, 2, tmp_path / name, num_train_epochs=20, learning_rate=3e-3, **changes))
        for name, changes in {
            "plain": {},
            "centred": {"center_rewards_coefficient": 0.1},
            "smooth": {"label_smoothing": 0.2},
        }.items()
    }
    middle = {name: abs(s["eval/chosen_mean"] + s["eval/rejected_mean"]) / 2 for name, s in summaries.items()}
    assert middle["centred"] < 0.3 * middle["plain"]
    assert all(summary["eval/accuracy"] == 1.0 for summary in summaries.values())
    assert summaries["smooth"]["eval/margin"] < 2 < summaries["plain"]["eval/margin"]  # logit(0.8) = 1.39


def test_several_epochs_and_accuracy_by_data_set(world, tmp_path):
    """Chosen responses of the second file are the shorter ones, those of the first the longer ones."""
    other = [row | {"prompt": row["prompt"].replace("thing", "item"), "chosen": " yes ."} for row in rows_of(world)]
    second = write_rows(tmp_path / "short.jsonl", other)
    output = tmp_path / "out"
    summary = run_step(2, flags(world, 2, output, data_path=[world["data"], second], num_train_epochs=3))
    rows = [row for row in read_metrics(output / "metrics.jsonl") if "train/epoch" in row]
    per_epoch = len(rows) // 3
    assert [row["train/epoch"] for row in rows] == [1] * per_epoch + [2] * per_epoch + [3] * per_epoch
    first_epoch, second_epoch = (training_losses(output)[start : start + per_epoch] for start in (0, per_epoch))
    assert sum(second_epoch) < sum(first_epoch)
    by_length = [summary[f"eval/accuracy_chosen_{which}"] for which in ("longer", "shorter")]
    by_source = [summary[f"eval/accuracy/{name}"] for name in ("pairs.jsonl", "short.jsonl")]
    assert by_length == by_source
    assert 0 <= summary["eval/calibration_error"] <= 1
    assert {f"{name}_before" for name in summary if name.startswith("eval/") and "before" not in name} <= set(summary)


def test_margins_that_cannot_be_used_are_refused(world, tmp_path, capsys):
    data = write_rows(tmp_path / "pairs.jsonl", [row | {"strength": "very"} for row in rows_of(world)])
    both = refused(flags(world, 2, margin=1, margin_column="strength"), capsys)
    assert "--margin 1 and --margin_column strength both set the margin" in both
    missing = refused(flags(world, 2, margin_column="strength"), capsys)
    assert "pairs.jsonl, line 1: has no column `strength`" in missing
    text = refused(flags(world, 2, data_path=[data], margin_column="strength"), capsys)
    assert "pairs.jsonl, line 1: `strength` must be a number, found str 'very'" in text
    assert len(text.splitlines()) == 1
