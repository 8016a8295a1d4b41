"""The three scripts end to end on tiny models: in process, through DeepSpeed's launcher, and with bad input."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from step_scripts import REPOSITORY, STEPS, flags, load_step, run_step, script_of, write_rows
from tiny_models import save_causal_lm, save_reward_model

from utils.arguments import run
from utils.output.metrics import read_metrics
from utils.rlhf.roles import Roles


def stopped(step: int, argv: list[str], capsys, code: int) -> list[str]:
    """The lines on stderr of a step that stops with exit code `code`."""
    script = load_step(step)
    with pytest.raises(SystemExit) as stop:
        run(script.main, script.Config, argv)
    assert stop.value.code == code
    return capsys.readouterr().err.strip().splitlines()


def refused(step: int, argv: list[str], capsys) -> str:
    """The one line that a step prints on stderr when it refuses its input with exit code 2."""
    lines = stopped(step, argv, capsys, 2)
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- what the steps do -----------------------------------------------------------------------------------------------


def test_step1_learns_and_its_loss_is_that_of_a_plain_loop(world, tmp_path):
    summary = run_step(1, flags(world, 1, tmp_path, max_steps=12, per_device_train_batch_size=8, eval_interval=5))
    assert summary["eval/loss"] < summary["eval/loss_before"] - 0.5
    rows = read_metrics(tmp_path / "metrics.jsonl")
    evaluations = [row["step"] for row in rows if "eval/perplexity" in row]
    assert evaluations == [0, 5, 10, 12]
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert rates[0] == 1e-3 and rates[-1] > 0  # those that the steps used
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "curves.png",
        "run_config.yaml",
        "summary.json",
        "data_report.json",
    } <= {path.name for path in tmp_path.iterdir()}
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = run_step(1, flags(world, 1, model_name_or_path=tmp_path, max_steps=1, num_sample_generations=0))
    assert again["eval/loss_before"] == pytest.approx(summary["eval/loss"], abs=1e-5)
    assert reloaded.config.eos_token_id == tokenizer.eos_token_id and reloaded.config.pad_token_id is not None


def test_step1_loss_on_held_out_rows_equals_a_hand_written_loop(world, tiny_tokenizer):
    """Every held-out row by itself: cross-entropy over response tokens and EOS, averaged over all of them."""
    script = load_step(1)
    from utils.arguments import parse_config
    from utils.data import Corpus, build_datasets

    config = parse_config(script.Config, flags(world, 1, max_steps=1, num_sample_generations=0))
    summary = script.main(config)
    _, rows = build_datasets(Corpus.of(config), tiny_tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(world["model"]).eval()
    total, count = 0.0, 0
    for index in range(len(rows)):
        ids, start = torch.tensor([rows[index]["input_ids"]]), rows[index]["response_start"]
        labels = ids.clone()
        labels[:, :start] = -100
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * (ids.size(1) - start)
        count += ids.size(1) - start
        assert ids[0, -1] == tiny_tokenizer.eos_token_id
    assert summary["eval/loss_before"] == pytest.approx(total / count, rel=1e-5)


def test_step1_result_does_not_depend_on_how_rows_are_grouped(world, tmp_path):
    """4 x 2 accumulation, 8 x 1, a token budget, and 8 x 1 under ZeRO-2 end with the same weights."""
    outputs = []
    for name, changes in {
        "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "whole": {"per_device_train_batch_size": 8},
        "budget": {"per_device_train_batch_size": 8, "max_tokens_per_batch": 100},
        "sharded": {"per_device_train_batch_size": 8, "zero_stage": 2, "max_tokens_per_batch": 100},
    }.items():
        run_step(1, flags(world, 1, tmp_path / name, max_steps=2, num_sample_generations=0, **changes))
        outputs.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    for other in outputs[1:]:
        for key, value in outputs[0].items():
            torch.testing.assert_close(other[key], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_step1_packing_gives_the_loss_and_gradients_of_the_rows_by_themselves(
    world, tmp_path, tiny_tokenizer, architecture
):
    """One step over the whole training set, in rows that several examples share and in rows of their own."""
    model = save_causal_lm(tmp_path / "model", tiny_tokenizer, architecture)
    outcomes = []
    for name, changes in {"packed": {"packing": True, "max_tokens_per_batch": 200}, "alone": {}}.items():
        output = tmp_path / name
        run_step(1, flags(
            world, 1, output, model_name_or_path=model, max_steps=1, per_device_train_batch_size=64, max_seq_len=96,
            num_sample_generations=0, dropout=0.0, **changes,
        ))  # fmt: skip
        row = next(row for row in read_metrics(output / "metrics.jsonl") if "train/loss" in row)
        outcomes.append((row, transformers.AutoModelForCausalLM.from_pretrained(output).state_dict()))
    (packed, packed_weights), (alone, weights) = outcomes
    assert packed["train/loss"] == pytest.approx(alone["train/loss"], rel=1e-5)
    assert packed["train/grad_norm"] == pytest.approx(alone["train/grad_norm"], rel=1e-4)
    for key, value in weights.items():
        if "k_proj.bias" not in key:  # softmax is invariant to it: its gradient is rounding alone, which Adam enlarges
            torch.testing.assert_close(packed_weights[key], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_zero3_saves_a_model_larger_than_what_deepspeed_gathers_ahead(
    world, tmp_path, tiny_tokenizer, step, monkeypatch
):
    """An evaluation leaves weights in flight, prefetched for a backward pass that does not come; saving needs them."""
    import utils.models.engine as training_engine

    def small_limits(*arguments, **options):
        config = zero_config(*arguments, **options)
        config["zero_optimization"] |= {"stage3_max_live_parameters": 60_000, "stage3_prefetch_bucket_size": 60_000}
        return config

    zero_config = training_engine.zero_config
    monkeypatch.setattr(training_engine, "zero_config", small_limits)
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}
    model = save_causal_lm(tmp_path / "model", tiny_tokenizer, **sizes)
    if step < 3:
        changes = {"model_name_or_path": model, "zero_stage": 3, "max_steps": 2}
        changes |= {"num_sample_generations": 0} if step == 1 else {}
    else:
        reward = save_reward_model(tmp_path / "reward", tiny_tokenizer, **sizes)
        changes = {"actor_model_name_or_path": model, "critic_model_name_or_path": reward, "eval_interval": 1}
        changes |= {"actor_zero_stage": 3, "critic_zero_stage": 3}
    run_step(step, flags(world, step, tmp_path / "out", **changes))
    opened = transformers.AutoConfig.from_pretrained(tmp_path / "out" / ("actor" if step == 3 else ""))
    assert opened.num_hidden_layers == 4


def test_step2_result_does_not_depend_on_a_token_budget(world, tmp_path):
    losses = []
    for budget in (0, 150):
        run_step(2, flags(world, 2, tmp_path / str(budget), max_steps=3, max_tokens_per_batch=budget))
        rows = read_metrics(tmp_path / str(budget) / "metrics.jsonl")
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("reward_loss", ["last_token", "token_span"])
def test_step2_learns_to_tell_answers_apart_and_stores_the_scale(world, tmp_path, reward_loss):
    summary = run_step(2, flags(world, 2, tmp_path, reward_loss=reward_loss, num_train_epochs=8))
    assert summary["eval/accuracy"] == 1.0 and summary["eval/loss"] < 0.3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["score_mean"] == pytest.approx(summary["eval/chosen_mean"])
    assert config["score_std"] == pytest.approx(summary["eval/chosen_std"])
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert classifier.score.weight.shape == (1, 32)


def test_step3_saves_models_that_open_and_metrics_that_are_complete(world, tmp_path):
    summary = run_step(3, flags(world, 3, tmp_path, enable_ema=True, ppo_epochs=2, kl_target=1.0, print_answers=True))
    assert summary["iterations"] == 2
    for name in ("actor", "actor_ema"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    row = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "ppo/kl_k1" in row][-1]
    expected = (
        "kl_k1 kl_k3 approx_kl_k1 approx_kl_k3 clip_fraction value_clip_fraction entropy ratio_mean ratio_max "
        "explained_variance ended_fraction length_mean length_std score_mean score_std reward_mean actor_grad_norm "
        "critic_grad_norm policy_loss value_loss first_ratio_mean kl_ctl"
    )
    assert {f"ppo/{name}" for name in expected.split()} <= set(row)
    assert {"time/generation", "time/scoring", "time/training", "throughput/samples_per_second"} <= set(row)
    assert row["ppo/first_ratio_mean"] == 1.0
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_step3_with_unsupervised_text(world, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"{i}: " + "the milk is white . " * 20} for i in range(30)])
    run_step(3, flags(world, 3, tmp_path, unsupervised_dataset_name=text))
    row = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "ppo/kl_k1" in row][-1]
    assert row["ppo/unsupervised_loss"] > 0


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_picture_that_cannot_be_drawn_costs_no_model(world, tmp_path, monkeypatch, step):
    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("utils.output.metrics.draw_curves", fail)
    changes = {} if step == 3 else {"num_train_epochs": 1}
    with pytest.raises(RuntimeError, match="no fonts"):
        run_step(step, flags(world, step, tmp_path, max_steps=1, **changes))
    saved = tmp_path / "actor" if step == 3 else tmp_path
    assert (saved / "model.safetensors").is_file()


def test_a_kl_that_is_not_finite_leaves_its_price(world, tmp_path, monkeypatch):
    """`--on_nan skip` continues after a rollout that cannot train."""
    script = load_step(3)
    original = script.rollout_metrics
    monkeypatch.setattr(script, "rollout_metrics", lambda *arguments: original(*arguments) | {"ppo/kl_k1": math.nan})
    run_step(3, flags(world, 3, tmp_path, kl_target=1.0, on_nan="skip", kl_ctl=0.3))
    assert {row["ppo/kl_ctl"] for row in read_metrics(tmp_path / "metrics.jsonl") if "ppo/kl_ctl" in row} == {0.3}


def test_test_mode_stops_early(world):
    argv = flags(world, 3, enable_test_mode=True, test_stop_step=1, eval_prompts=0)
    assert run_step(3, argv)["iterations"] == 1


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "gpt_neox", "phi"])
def test_other_architectures_take_the_same_path(world, tiny_tokenizer, tmp_path, architecture):
    model = str(save_causal_lm(tmp_path / "model", tiny_tokenizer, architecture))
    run_step(1, flags(world, 1, tmp_path / "sft", model_name_or_path=model, max_steps=1, num_sample_generations=1))
    sft = str(tmp_path / "sft")
    run_step(2, flags(world, 2, tmp_path / "reward", model_name_or_path=sft, max_steps=1))
    paths = {"actor_model_name_or_path": sft, "critic_model_name_or_path": str(tmp_path / "reward")}
    assert run_step(3, flags(world, 3, max_steps=1, **paths))["iterations"] == 1


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [0, 4])
def test_saved_actor_has_the_logprobs_of_the_engine(world, tmp_path, monkeypatch, stage, lora):
    """What `from_pretrained` gives is what trained, merged LoRA included; bf16 rounds a merge once more."""
    captured, save = {}, Roles.save

    def score_and_save(self, output_dir):
        ids = torch.arange(3, 40)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        targets = mask.clone()
        targets[:, 0] = False
        with torch.no_grad():
            captured["logprobs"], captured["ids"] = self.actor.engine(ids, mask, targets)[0], ids
        save(self, output_dir)

    monkeypatch.setattr(Roles, "save", score_and_save)
    rates = {"actor_learning_rate": 1e-3, "actor_lora_learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    stages = {"actor_zero_stage": stage, "critic_zero_stage": stage, "actor_gradient_checkpointing": True}
    run_step(3, flags(world, 3, tmp_path, actor_lora_dim=lora, save_adapter=True, **rates, **stages))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "actor").eval()
    ids = captured["ids"]
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(captured["logprobs"], expected, atol=1e-4, rtol=1e-4)
    if lora:
        from peft import PeftModel

        base = transformers.AutoModelForCausalLM.from_pretrained(world["model"])
        names = {name for name, _ in base.named_parameters()}
        assert names == {name for name, _ in model.named_parameters()}
        adapted = PeftModel.from_pretrained(base, tmp_path / "actor" / "adapter")
        assert any("lora_B" in name and p.abs().max() > 0 for name, p in adapted.named_parameters())
    else:
        assert not (tmp_path / "actor" / "adapter").exists()


def test_saved_configuration_runs_again(world, tmp_path):
    first = run_step(1, flags(world, 1, tmp_path, max_steps=2, num_sample_generations=0))
    again = run_step(1, ["--config", str(tmp_path / "run_config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert again["eval/loss"] == first["eval/loss"]


# --- what the steps refuse -------------------------------------------------------------------------------------------

BAD_FLAGS = [
    (1, {"data_path": "nowhere.jsonl"}, "--data_path nowhere.jsonl"),
    (1, {"model_name_or_path": "./nowhere"}, "--model_name_or_path ./nowhere"),
    (1, {"output_dir": __file__}, "is a file; name a folder"),
    (1, {"output_dir": "MODEL"}, "would write over its --model_name_or_path"),
    (1, {"enable_tensorboard": True, "tensorboard_path": __file__}, "--tensorboard_path"),
    (1, {"max_seq_len": 512}, "the model has 256 positions"),
    (1, {"lora_dim": 4, "lora_module_name": "decoder.layers."}, "matches no linear layer"),
    (1, {"zero_stage": 4}, "--zero_stage"),
    (1, {"per_device_train_batch_size": 0}, "--per_device_train_batch_size"),
    (1, {"per_device_train_batch_size": -1}, "--per_device_train_batch_size"),
    (1, {"data_split": "0,1,1"}, "--data_split"),
    (1, {"data_split": "a,b,c"}, "--data_split"),
    (1, {"learnig_rate": 1}, "did you mean --learning_rate"),
    (1, {"output_dir": "/proc/nowhere"}, "--output_dir"),
    (1, {"output_dir": "x" * 300}, "--output_dir"),
    (1, {"seed": 2**64}, "--seed must be at most"),
    (1, {"learning_rate": "-1e-5"}, "--learning_rate must be above 0"),
    (1, {"data_path": "/dev/null"}, "neither a file nor a folder"),
    (1, {"streaming": True}, "--streaming needs --max_steps"),
    (3, {"temperature": 1e-30}, "--temperature must be at least 0.001"),
    (2, {"data_path": "some-org/some-data"}, "some-org/some-data"),
    (3, {"critic_model_name_or_path": "MODEL"}, "not a reward model"),
    (3, {"per_device_training_batch_size": 3}, "--per_device_training_batch_size"),
    (3, {"inference_tp_size": 2}, "--inference_tp_size"),
    (3, {"max_answer_seq_len": 250}, "--max_prompt_seq_len + --max_answer_seq_len"),
]
if not torch.accelerator.is_available():
    BAD_FLAGS.append((1, {"dtype": "fp16"}, "--dtype fp16"))


@pytest.mark.parametrize(("step", "changes", "message"), BAD_FLAGS, ids=[str(case[1]) for case in BAD_FLAGS])
def test_bad_flags_are_one_line_before_any_model_is_loaded(world, capsys, monkeypatch, step, changes, message):
    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    changes = {name: world["model"] if value == "MODEL" else value for name, value in changes.items()}
    assert message in refused(step, flags(world, step, **changes), capsys)


@pytest.mark.parametrize(
    ("step", "folders", "flag"),
    [
        (1, {"model_name_or_path": "best"}, "--model_name_or_path"),
        (3, {"actor_model_name_or_path": "actor"}, "--actor_model_name_or_path"),
        (3, {"critic_model_name_or_path": "best/critic"}, "--critic_model_name_or_path"),
    ],
    ids=str,
)
def test_a_model_that_the_run_would_write_over_is_refused(world, capsys, tmp_path, step, folders, flag):
    changes = {}
    for name, folder in folders.items():
        source = world["reward"] if "critic" in name else world["model"]
        changes[name] = shutil.copytree(source, tmp_path / folder)
    assert f"would write over its {flag}" in refused(step, flags(world, step, tmp_path, **changes), capsys)


def test_a_model_elsewhere_in_the_output_folder_is_welcome(world, tmp_path):
    model = shutil.copytree(world["model"], tmp_path / "models" / "actor")
    run_step(1, flags(world, 1, tmp_path, model_name_or_path=model, max_steps=1, num_sample_generations=0))


@pytest.mark.parametrize("step", STEPS)
def test_a_run_does_not_write_over_its_data(world, capsys, tmp_path, step):
    rows = Path(world["data"]).read_text()
    for name in ("metrics.jsonl", "config.json"):
        data = tmp_path / name
        data.write_text(rows)
        line = refused(step, flags(world, step, tmp_path, data_path=data), capsys)
        assert f"the run would write over its --data_path {data}" in line and data.read_text() == rows
        data.unlink()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text(rows)
    for output in (folder, folder / "out"):
        line = refused(step, flags(world, step, output, data_path=folder), capsys)
        assert f"--output_dir {output} lies in the data folder --data_path {folder}" in line
    assert [path.name for path in folder.iterdir()] == ["pairs.jsonl"]


def test_data_of_another_name_may_lie_in_the_output_folder(world, tmp_path):
    data = shutil.copy(world["data"], tmp_path / "pairs.jsonl")
    run_step(1, flags(world, 1, tmp_path, data_path=data, max_steps=1, num_sample_generations=0))
    assert Path(data).read_text() == Path(world["data"]).read_text()


def test_a_refused_run_leaves_no_empty_folder(world, capsys, tmp_path):
    output = tmp_path / "not" / "there"
    refused(1, flags(world, 1, output, data_path="nowhere.jsonl"), capsys)
    assert list(tmp_path.iterdir()) == []


GOOD = '{"prompt": " Human: a Assistant:", "chosen": " b", "rejected": " c"}\n'
BAD_FILES = [
    ("", "is empty"),
    ("\n\n", "holds no rows"),
    (GOOD * 3 + '{"prompt": "x", \n', ":4"),
    (GOOD * 3 + '{"prompt": "x", "chosen": "y"}\n', ":4"),
    ('{"question": "x", "answer": "y"}\n' * 9, "question"),
    (GOOD * 3 + '{"prompt": " Human: a Assistant:", "chosen": "", "rejected": " c"}\n', ":4"),
    (GOOD * 3 + '{"prompt": " Human: a Assistant:", "chosen": 5, "rejected": " c"}\n', ":4"),
    (GOOD, "data"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_bad_files_are_one_line_with_file_and_line(world, capsys, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    line = refused(2, flags(world, 2, tmp_path / "out", data_path=tmp_path / "bad.jsonl"), capsys)
    assert "bad.jsonl" in line
    assert message in line.replace(", line ", ":").replace(" line ", ":"), line
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_bad_row_of_a_stream_ends_the_run_where_it_is_reached_and_earlier_steps_are_saved(world, capsys, tmp_path):
    rows = [{"prompt": f" Human: what is {i} ? Assistant:", "chosen": " white ."} for i in range(250)]
    del rows[220]["chosen"]
    data = write_rows(tmp_path / "bad.jsonl", rows)
    changes = {"streaming": True, "shuffle_buffer_size": 8, "data_split": "1,0,0", "max_steps": 99, "save_interval": 5}
    changes |= {"num_sample_generations": 0, "eval_samples": 4, "per_device_train_batch_size": 8}
    lines = stopped(1, flags(world, 1, tmp_path / "out", data_path=data, **changes), capsys, 2)
    assert lines[-1] == f"error: {data}, line 221: column `chosen` is missing; columns found: prompt"
    saved = [int(path.name.split("-")[1]) for path in (tmp_path / "out" / "checkpoints").glob("checkpoint-*")]
    assert max(saved) == 25  # after some 209 rows to train on, 8 in a step


@pytest.mark.parametrize("step", STEPS)
def test_divergence_in_the_last_step_saves_nothing(world, capsys, tmp_path, step):
    rates = {"actor_learning_rate": 1e20, "eval_prompts": 0} if step == "step3" else {"learning_rate": 1e20}
    argv = flags(world, step, tmp_path, max_steps=1, max_grad_norm=0, **rates)
    line = stopped(step, argv, capsys, 3)[-1]
    assert line.startswith("error: ") and "learning_rate" in line
    assert not list(tmp_path.rglob("model.safetensors"))


def test_divergence_stops_with_the_step_and_advice(world, capsys, tmp_path):
    argv = flags(world, 1, tmp_path, learning_rate=1e20, max_steps=6, max_grad_norm=0, num_sample_generations=0)
    line = stopped(1, argv, capsys, 3)[-1]
    assert "step" in line and "--learning_rate" in line
    assert not (tmp_path / "model.safetensors").exists()


# --- launching -------------------------------------------------------------------------------------------------------

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(step: int, argv: list[str], *, folder: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Two ranks through DeepSpeed's launcher, started in `folder`."""
    script = os.path.relpath(script_of(step), folder)
    return subprocess.run(
        [*DEEPSPEED, free_port(), script, *argv],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "folder",
    [pytest.param(REPOSITORY, id="root"), pytest.param(REPOSITORY / "training", id="training", marks=pytest.mark.slow)],
)
def test_two_ranks_through_the_launcher(world, tmp_path, folder):
    argv = flags(world, 3, tmp_path, actor_zero_stage=3, critic_zero_stage=3, dtype="bf16", eval_prompts=3)
    result = launch(3, argv, folder=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    assert result.stdout.count("saved to") == 1


def test_a_refusal_on_two_ranks_is_one_line_and_a_failing_exit(world):
    result = launch(1, flags(world, 1, data_path="nowhere.jsonl"))
    assert result.returncode == 2
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "error: rank 5: the environment has RANK=5 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "error: port PORT of this machine, at which the processes must connect"),
    ],
    ids=["rank", "port"],
)
def test_processes_that_cannot_meet_say_why(world, environment, line):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = environment | {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        result = subprocess.run(
            [sys.executable, str(script_of(1)), *flags(world, 1)],
            env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(line.replace("PORT", port, 1))


def test_interrupt_leaves_nothing_half_written(world, tmp_path):
    argv = flags(world, 1, tmp_path, num_train_epochs=10_000, num_sample_generations=0)
    process = subprocess.Popen(
        [sys.executable, str(script_of(1)), *argv],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not (tmp_path / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"data_report.json", "metrics.jsonl", "run_config.yaml"}


NO_CONNECTIONS = """
import ipaddress, runpy, socket, sys
connect, lookup = socket.socket.connect, socket.getaddrinfo

def guarded_connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
        sys.exit(f"opened a connection to {address}")
    return connect(self, address)

def guarded_lookup(host, *arguments, **options):
    if host not in ("127.0.0.1", "localhost", socket.gethostname(), None):
        sys.exit(f"looked up {host}")
    return lookup(host, *arguments, **options)

socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_lookup
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_with_local_paths_opens_no_connection(world, tmp_path):
    """Without HF_HUB_OFFLINE: nothing may even ask for an address."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HF_")}
    argv = flags(world, 3, tmp_path, data_output_path=tmp_path / "cache")
    result = subprocess.run(
        [sys.executable, "-c", NO_CONNECTIONS, str(script_of(3)), *argv],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
