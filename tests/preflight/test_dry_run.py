"""`--dry_run` and `scripts/estimate_memory.py`: what they say, their exit codes; they load and write nothing."""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from step_scripts import REPOSITORY, flags, load_step, run_step

from utils.arguments.run import parse_config, run
from utils.data.batches.sizes import Rows
from utils.errors import DoesNotFit, InputError
from utils.preflight.advice import advise
from utils.preflight.estimate import estimate
from utils.preflight.phases import Machine
from utils.preflight.report import ORDER
from utils.preflight.roles import Subject

MIB = 2**20


@pytest.fixture
def no_weights(monkeypatch):
    """Reading any weights fails the test."""

    def refuse(*arguments, **keywords):
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)


def give_memory(monkeypatch, size: float) -> None:
    machine = Machine(device_type="cpu", world_size=1, base=0, memory=size)
    monkeypatch.setattr("utils.preflight.dry_runs.this_machine", lambda: machine)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_dry_run_reports_without_weights_and_writes_nothing(world, tmp_path, step, no_weights, capsys):
    output = tmp_path / "out"
    numbers = run_step(step, flags(world, step, output, dry_run=True))
    printed = capsys.readouterr().out
    assert not output.exists()
    phases = ["generation", "scoring", "actor training", "critic training"] if step == 3 else ["evaluation", "training"]
    for word in ("base of the process", "total", *phases):  # a tiny model's own items round to nothing
        assert word in printed, word
    assert numbers["predicted_peak_bytes"] > 100 * MIB  # the process itself
    assert f"optimiser steps: {numbers['optimiser_steps']}" in printed and "fits in the" in printed


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (1, {"num_train_epochs": 2, "gradient_accumulation_steps": 2}),
        (1, {"packing": True, "per_device_train_batch_size": 2}),
        (2, {"per_device_train_batch_size": 3}),
        (3, {"max_steps": 0, "ppo_epochs": 2}),
    ],
)
def test_the_number_of_steps_is_that_of_the_real_run(world, step, changes):
    changes = {"num_sample_generations": 0} | changes if step == 1 else changes
    said = run_step(step, flags(world, step, dry_run=True, **changes))["optimiser_steps"]
    summary = run_step(step, flags(world, step, **changes))
    assert said == (summary["iterations"] * 2 * 2 if step == 3 else summary["steps"])


def test_a_run_that_does_not_fit_exits_with_4_and_says_what_to_change(world, tmp_path, monkeypatch, capsys, no_weights):
    give_memory(monkeypatch, 3 * MIB)
    script = load_step(1)
    many = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 1}
    with pytest.raises(SystemExit) as stop:
        run(script.main, script.Config, flags(world, 1, tmp_path / "out", dry_run=True, **many))
    printed = capsys.readouterr()
    assert stop.value.code == 4
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: predicted peak: ") and "does not fit in the" in lines[0]
    assert "what to change" in printed.out and "--per_device_train_batch_size 8" in printed.out
    assert not (tmp_path / "out").exists()


# --- what to change --------------------------------------------------------------------------------------------------

LLAMA = transformers.LlamaConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=1024, pad_token_id=0,
)  # fmt: skip


def advice_for(step: int, share: float, *, world_size: int = 1, device_type: str = "cuda", **changes):
    """The advice for a process that has `share` of the memory it needs, preceded by what it was computed from."""
    names = ("actor_model_name_or_path", "critic_model_name_or_path") if step == 3 else ("model_name_or_path",)
    config = load_step(step).Config(**dict.fromkeys(names, "somewhere"), **changes)
    subject = Subject(load_step(step).plan_of, dict.fromkeys(config.roles(), LLAMA), 0, Rows(1000))
    machine = Machine(device_type=device_type, world_size=world_size, base=0, memory=None)
    now = estimate(config, subject, machine)
    machine = dataclasses.replace(machine, memory=share * now.peak)
    return config, subject, machine, now, advise(config, subject, machine, now)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("share", [0.9, 0.3])
def test_every_advice_helps_and_the_last_resort_fits(step, share):
    _, _, machine, now, advice = advice_for(step, share, world_size=8)
    assert advice and all(a.after.peak < now.peak for a in advice)
    assert any(a.after.peak <= machine.memory for a in advice)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
@pytest.mark.parametrize("zero", [{}, {"zero": 3}])
def test_every_item_of_an_estimate_has_a_row(step, device_type, zero):
    """Otherwise the rows would not add up to the total."""
    stages = ("actor_zero_stage", "critic_zero_stage") if step == 3 else ("zero_stage",)
    changes = dict.fromkeys(stages, zero.get("zero", 0))
    if step == 3:
        changes |= {"enable_ema": True, "unsupervised_dataset_name": "text.jsonl"}
    now = advice_for(step, 1.0, world_size=2, device_type=device_type, **changes)[3]
    assert {name for phase in now.phases for name in phase.items} <= set(ORDER)


def test_advised_flags_give_the_estimate_that_the_advice_promises():
    """The flags as printed, parsed again by the step's own parser."""
    _, subject, machine, _, advice = advice_for(3, 0.3, world_size=8)
    for one in advice:
        argv = ["--actor_model_name_or_path", "somewhere", "--critic_model_name_or_path", "somewhere"]
        config = parse_config(load_step(3).Config, [*argv, *one.flags.split()])
        assert estimate(config, subject, machine).peak == one.after.peak


def test_advice_names_what_the_machine_has():
    def named(**options):
        return " ".join(a.flags for a in advice_for(**options)[-1])

    one_gpu = named(step=1, share=0.3)
    assert "zero_stage" not in one_gpu and "--offload" in one_gpu and "--gradient_checkpointing" in one_gpu
    assert "--zero_stage 3" in named(step=1, share=0.3, world_size=8)
    assert "offload" not in named(step=1, share=0.3, device_type="cpu")
    assert "--gradient_checkpointing" not in named(step=1, share=0.3, gradient_checkpointing=True)
    rlhf = named(step=3, share=0.2, world_size=8)
    for flag_name in ("--actor_zero_stage 3 --critic_zero_stage 3", "--max_tokens_per_batch", "--only_optimize_lora"):
        assert flag_name in rlhf


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = REPOSITORY / "scripts" / "estimate_memory.py"
    spec = importlib.util.spec_from_file_location("estimate_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare_model(source: str, folder: Path) -> str:
    """A folder with nothing but the config.json of `source`."""
    folder.mkdir()
    shutil.copy(Path(source) / "config.json", folder)
    return str(folder)


def test_the_script_needs_config_files_alone(world, tmp_path, script, capsys, no_weights):
    actor, critic = bare_model(world["model"], tmp_path / "actor"), bare_model(world["reward"], tmp_path / "critic")
    argv = ["--actor_model_name_or_path", actor, "--critic_model_name_or_path", critic, "--actor_zero_stage", "3"]
    script.main(["step3", "--world_size", "8", "--device_memory", "80", "--rows", "1024", *argv])
    printed = capsys.readouterr().out
    assert "predicted memory of each of 8 processes" in printed and "fits in the 80.00 GiB" in printed
    # 1024 prompts in rollouts of 8 x 16
    assert "optimiser steps: 8 (actor 8, critic 8), on 1024 training rows" in printed
    with pytest.raises(DoesNotFit, match="does not fit in the 1.00 GiB"):
        script.main(["step3", "--world_size", "8", "--device_memory", "1", "--rows", "1024", *argv])


def test_the_script_counts_the_rows_of_the_data(world, script, capsys, no_weights):
    argv = flags(world, 1)
    script.main(["step1", "--device", "cpu", *argv])
    printed = capsys.readouterr().out
    said = run_step(1, [*argv, "--dry_run"])
    assert f"optimiser steps: {said['optimiser_steps']}, on" in printed
    script.main(["step1", *flags(world, 1, data_path="/nowhere/data.jsonl")])
    assert "optimiser steps: not known" in capsys.readouterr().out


def test_the_script_packs_rows_as_the_step_does(world, script, capsys, no_weights):
    argv = flags(world, 1, packing=True, per_device_train_batch_size=2)
    said = run_step(1, [*argv, "--dry_run"])
    capsys.readouterr()
    script.main(["step1", "--device", "cpu", *argv])
    assert f"optimiser steps: {said['optimiser_steps']}, on" in capsys.readouterr().out


def test_the_rows_of_a_stream_are_taken_at_their_longest(world, script, capsys, no_weights):
    argv = flags(world, 1, streaming=True, max_steps=5, packing=True)
    said = run_step(1, [*argv, "--dry_run"])
    assert said["optimiser_steps"] == 5 and said["tokens_per_step"] == 4 * 64
    script.main(["step1", "--device", "cpu", *argv])
    assert capsys.readouterr().out.count("optimiser steps: 5\n") == 2


def test_the_script_reads_each_model_of_step_3_once(world, tmp_path, script, no_weights):
    actor, critic = bare_model(world["model"], tmp_path / "actor"), bare_model(world["reward"], tmp_path / "critic")
    given = {"actor_model_name_or_path": actor, "critic_model_name_or_path": critic}
    models = script.read_models(parse_config(load_step(3).Config, flags(world, 3, **given)))
    assert list(models) == ["actor", "critic", "reference", "reward"]
    assert models["actor"] is models["reference"] and models["critic"] is models["reward"]
    own = given | {"reward_model_name_or_path": bare_model(world["reward"], tmp_path / "reward")}
    models = script.read_models(parse_config(load_step(3).Config, flags(world, 3, **own)))
    assert models["critic"] is not models["reward"]
    with pytest.raises(InputError, match=r"^--reward_model_name_or_path \S+/nowhere: no such folder"):
        own["reward_model_name_or_path"] = tmp_path / "nowhere"
        script.read_models(parse_config(load_step(3).Config, flags(world, 3, **own)))


def test_the_script_refuses_in_one_line(world, tmp_path, script):
    for name, value, message in (
        ("world_size", "0", "must be at least 1, got 0"),
        ("rows", "0", "must be at least 1, got 0"),
        ("device_memory", "-1", "must be at least 0, got -1.0"),
        ("device_memory", "nan", "must be a finite number, got nan"),
        ("device_memory", "inf", "must be a finite number, got inf"),
    ):
        with pytest.raises(InputError, match=f"^--{name} {message}$"):
            script.main(["step1", f"--{name}", value, "--model_name_or_path", world["model"]])
    command = [sys.executable, str(REPOSITORY / "scripts" / "estimate_memory.py"), "step1"]
    done = subprocess.run(
        [*command, "--model_name_or_path", str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 2 and "no config.json" in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1


# --- against a real run ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_measured_run_is_within_15_percent(tmp_path):
    benchmark = [sys.executable, str(REPOSITORY / "scripts" / "benchmarks" / "memory.py"), "--only", "sft-zero2-small"]
    subprocess.run([*benchmark, "--output_dir", str(tmp_path)], check=True, cwd=REPOSITORY)
    table = (tmp_path / "memory.md").read_text(encoding="utf-8")
    ratio = float(re.search(r"\| ([\d.]+) \|\n$", table)[1])
    assert 0.85 <= ratio <= 1.15
