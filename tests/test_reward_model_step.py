"""Step 2 end to end: additions to the loss, several epochs, several data sets, and heads with a hidden layer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from step_scripts import flags, load_step, run_step, write_rows

from utils.arguments import run
from utils.models.loading import load_scalar_model
from utils.output.metrics import read_metrics
from utils.parallel.zero import zero_config
from utils.rlhf.roles import Critic


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
    common = {"max_steps": 2, "reward_loss": reward_loss, "data_path": [data]}
    options = {"plain": {}, "constant": {"margin": 1.5}, "column": {"margin_column": "strength"}}
    for name, changes in options.items():
        run_step(2, flags(world, 2, tmp_path / name, **common, **changes))
    plain, constant, column = (training_losses(tmp_path / name) for name in options)
    assert column == constant and constant[0] > plain[0] + 0.3


def test_centring_moves_scores_towards_zero_and_smoothing_limits_confidence(world, tmp_path):
    summaries = {
        name: run_step(2, flags(world, 2, tmp_path / name, num_train_epochs=10, learning_rate=5e-3, **changes))
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


# --- heads with a hidden layer ---------------------------------------------------------------------------------------

HEAD = {"head_hidden_size": 12, "head_dropout": 0.1}
HEAD_NAMES = {"score.weight", "score.bias", "score.output.weight"}


def head_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "score" in name}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_hidden_layer_trains_is_saved_and_starts_a_critic(
    world, tmp_path, capsys, tiny_tokenizer, stage, monkeypatch
):
    reward, ppo = tmp_path / "reward", tmp_path / "ppo"
    summary = run_step(2, flags(world, 2, reward, num_train_epochs=6, zero_stage=stage, **HEAD))
    assert summary["eval/accuracy"] == 1.0
    assert "its head has a hidden layer of 12: this project opens the saved folder" in capsys.readouterr().out
    again = load_scalar_model(str(reward), tiny_tokenizer, zero_config(0, "fp32"), dtype="fp32").eval()
    assert set(head_of(reward)) == HEAD_NAMES
    critics, values = [], Critic.values

    def noted(self, batch):
        critics.append(self)
        return values(self, batch)

    monkeypatch.setattr(Critic, "values", noted)
    stages = {"actor_zero_stage": stage, "critic_zero_stage": stage}
    run_step(3, flags(world, 3, ppo, critic_model_name_or_path=reward, **stages, max_steps=1))
    assert critics[0].engine.module.model.score.output.dropout == 0.0
    before, after = head_of(reward), head_of(ppo / "critic")
    assert set(after) == HEAD_NAMES and all(not torch.equal(before[name], after[name]) for name in HEAD_NAMES)
    critic = load_scalar_model(str(ppo / "critic"), tiny_tokenizer, zero_config(0, "fp32"), dtype="fp32").eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        first, second = (model(ids, torch.ones_like(ids)) for model in (again, critic))
    assert 0 < (first - second).abs().max() < 0.5  # a step away


def test_lora_alone_trains_the_whole_head(world, tmp_path):
    """Against the same run of no more than one step with a tiny rate: the three tensors of the head move."""
    heads = []
    for name, rate in (("still", 1e-12), ("moved", 1e-2)):
        lora = {"lora_dim": 4, "only_optimize_lora": True, "save_adapter": True, "max_steps": 3}
        run_step(2, flags(world, 2, tmp_path / name, learning_rate=rate, **lora, **HEAD))
        heads.append(head_of(tmp_path / name))
    assert all((heads[0][name] - heads[1][name]).abs().max() > 1e-3 for name in HEAD_NAMES)
    adapter = tmp_path / "moved" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    names = set(load_file(adapter / "adapter_model.safetensors"))
    assert {f"base_model.model.{name}" for name in HEAD_NAMES} <= names


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_with_a_hidden_layer_resumes_as_if_it_had_not_stopped(world, tmp_path, stage):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    common = {"max_steps": 4, "zero_stage": stage, "lr_scheduler_type": "constant", "num_warmup_steps": 0, **HEAD}
    run_step(2, flags(world, 2, whole, **common))
    run_step(2, flags(world, 2, stopped, save_interval=2, **common | {"max_steps": 2}))
    run_step(2, flags(world, 2, stopped, save_interval=2, resume_from_checkpoint="auto", **common))
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, load_file(stopped / "model.safetensors")[name]), name
    assert "--head_hidden_size" in refused_to_resume(world, stopped, common)


def refused_to_resume(world, output, common) -> str:
    from utils.errors import InputError

    with pytest.raises(InputError) as error:
        changes = common | {"head_hidden_size": 16, "max_steps": 6}
        run_step(2, flags(world, 2, output, save_interval=2, resume_from_checkpoint="auto", **changes))
    return str(error.value)


def test_the_dry_run_knows_the_head(world):
    linear, hidden = (
        run_step(2, flags(world, 2, dry_run=True, head_hidden_size=width))["predicted_peak_bytes"]
        for width in (0, 4096)
    )
    assert hidden - linear > 4 * 4 * 4096 * 32  # weight, gradient and two moments of the hidden layer in fp32


def test_a_hidden_layer_of_one_unit_is_refused(world, capsys):
    assert "--head_hidden_size 1: a hidden layer has at least 2" in refused(flags(world, 2, head_hidden_size=1), capsys)
