"""What a sweep's file says: its combinations, and what is refused before anything runs."""

import re

import pytest
import yaml
from step_scripts import REPOSITORY

from utils.arguments.steps import STEPS
from utils.errors import InputError
from utils.sweeps.grid import LONGEST_NAME, folder_name, read_sweep

BASE = {
    "step": "step1",
    "flags": {"model_name_or_path": "m", "max_seq_len": 64},
    "grid": {"learning_rate": ["1e-4", 1e-3], "lora_dim": [0, 4]},
    "metric": "eval/loss",
    "goal": "min",
}
FILES = sorted((REPOSITORY / "scripts" / "sweeps").glob("*.yaml"))


def sweep_of(tmp_path, further=(), **changes):
    content = {key: value for key, value in (BASE | changes).items() if value is not None}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_sweep(tmp_path / "sweep.yaml", tmp_path / "out", further)


def test_every_combination_is_a_run(tmp_path):
    sweep = sweep_of(tmp_path, ["--max_steps", "7"])
    assert sweep.swept == ("learning_rate", "lora_dim")
    assert [run.values for run in sweep.runs] == [
        {"learning_rate": rate, "lora_dim": dim} for rate in (1e-4, 1e-3) for dim in (0, 4)
    ]
    first = sweep.runs[0]
    assert first.name == "learning_rate-0.0001_lora_dim-0"
    words = "--model_name_or_path m --max_seq_len 64 --learning_rate 0.0001 --lora_dim 0 --max_steps 7"
    assert list(first.words) == words.split()
    assert (first.config.learning_rate, first.config.max_seq_len, first.config.max_steps) == (1e-4, 64, 7)
    assert first.config.output_dir == str(tmp_path / "out" / first.name)


def test_sets_of_flags_are_combined_with_the_grid_and_shown_for_every_run(tmp_path):
    """As in DeepSpeed-Chat's sweep of step 1, where LoRA has a learning rate of its own."""
    sets = [{"lora_dim": 8, "only_optimize_lora": True, "learning_rate": 1e-3}, {"learning_rate": 1e-5}]
    sweep = sweep_of(tmp_path, runs=sets, grid={"zero_stage": [2, 3], "data_path": [["a", "b"]]})
    found = [tuple(run.values[name] for name in ("lora_dim", "only_optimize_lora", "zero_stage")) for run in sweep.runs]
    assert found == [(8, True, 2), (8, True, 3), (0, False, 2), (0, False, 3)]
    assert sweep.swept == ("lora_dim", "only_optimize_lora", "learning_rate", "zero_stage", "data_path")
    assert sweep.runs[0].config.data_path == ["a", "b"]
    assert "--only_optimize_lora" in sweep.runs[0].words and "--only_optimize_lora" not in sweep.runs[2].words


def test_presets_come_first(tmp_path):
    (tmp_path / "preset.yaml").write_text("max_seq_len: 99\nseed: 5\n")
    (run, _) = sweep_of(tmp_path, config=[str(tmp_path / "preset.yaml")], grid={"dropout": [0.0, 0.1]}).runs
    assert (run.config.max_seq_len, run.config.seed) == (64, 5)


def test_a_switch_that_is_off_overrides_a_preset(tmp_path):
    (tmp_path / "preset.yaml").write_text("offload: true\n")
    sweep = sweep_of(tmp_path, config=str(tmp_path / "preset.yaml"), grid={"offload": [True, False]})
    assert [run.config.offload for run in sweep.runs] == [True, False]


REFUSED = [
    ({"setp": "x"}, "unknown key 'setp'; did you mean step?"),
    ({"step": "step9"}, "step: there is no step 'step9'; choose from step1, step2"),
    ({"step": None}, "step: expected text, got nothing"),
    ({"goal": "maximum"}, "goal: expected max or min, got 'maximum'"),
    ({"metric": None}, "metric: expected text"),
    ({"grid": None}, "nothing to sweep: name flags and their values under grid"),
    ({"grid": [1]}, "grid: expected lines like"),
    ({"grid": {"dropout": 0.1}}, "grid: dropout: expected a list of values such as [1, 2], got 0.1"),
    ({"grid": {"dropout": []}}, "grid: dropout: expected a list"),
    ({"grid": {"dropout": [None]}}, "grid: dropout has no value"),
    ({"grid": {"learnig_rate": [1]}}, "grid: unknown flag 'learnig_rate'; did you mean learning_rate?"),
    ({"grid": {"max_steps": [1, "x"]}}, "grid: max_steps: expected a whole number, got 'x'"),
    ({"grid": {"max_seq_len": [8]}}, "--max_seq_len is swept and among the flags of all runs"),
    ({"grid": {"output_dir": ["a"]}}, "grid: output_dir is set by the sweep itself"),
    ({"flags": {"resume_from_checkpoint": "auto"}}, "flags: resume_from_checkpoint is set by the sweep itself"),
    ({"flags": {"seed": 1}}, "--model_name_or_path is required"),
    ({"flags": {"seed": {}}}, "flags: seed: expected a single value, got a dict"),
    ({"grid": {"learning_rate": [1e-3, -1]}}, "run learning_rate--1.0: --learning_rate must be above 0, got -1.0"),
    ({"grid": {"zero_stage": [0, 4]}}, "grid: zero_stage: unknown choice '4'"),
    ({"grid": {"lora_dim": [0, 4, 4]}}, "two runs have the same flags: lora_dim-4; leave one out"),
    ({"grid": {"learning_rate": ["1e-3", 0.001]}}, "two runs have the same flags: learning_rate-0.001"),
    ({"grid": None, "runs": [{"seed": 1}, {"seed": 1, "dropout": None}]}, "runs, entry 2: dropout has no value"),
    ({"grid": {"seed": [1]}, "runs": [{"seed": 2}]}, "--seed is in the grid and under runs"),
    ({"grid": None, "runs": [{}]}, "runs: an entry sets no flag"),
    ({"config": ["nowhere.yaml"]}, "--config nowhere.yaml: cannot be read"),
    ({"columns": [1]}, "columns: expected a list of texts"),
    ({"grid": {"max_tokens_per_batch": [8, 4096]}}, "--max_tokens_per_batch 8 cannot hold one row of up to 64 tokens"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        sweep_of(tmp_path, **changes)
    assert str(error.value).startswith(str(tmp_path / "sweep.yaml"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--lora_dim", "2"], "--lora_dim is swept, so the command line cannot set it"),
        (["--local_rank=1"], "--local_rank=1 is set by the sweep itself"),
        (["--sed", "1"], "unknown flag --sed; did you mean --seed?"),
        (["--seed", "x"], "--seed: expected a whole number, got 'x'"),
    ],
)
def test_flags_of_the_command_line_are_refused(tmp_path, further, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sweep_of(tmp_path, further)


def test_files_that_are_no_sweep(tmp_path):
    for text, message in (("- a\n", "found a list"), ("step: [\n", "not valid YAML"), ("step: a\nstep: b\n", "twice")):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_sweep(tmp_path / "sweep.yaml", tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_sweep(tmp_path / "nowhere.yaml", tmp_path)


def test_names_are_safe_for_a_file_system_and_differ():
    assert folder_name({"beta": 0.1, "offload": True}) == "beta-0.1_offload-true"
    odd = [{"data_path": ["a/b", "c"]}, {"data_path": ["a-b", "c"]}, {"data_path": ["a b c"]}, {"x": "ä"}, {"x": "ö"}]
    odd += [{"x": "long" * 99}, {"x": "long" * 99 + "er"}]
    names = [folder_name(values) for values in odd]
    assert len(set(names)) == len(odd)
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]+", name) and len(name) <= LONGEST_NAME for name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_files_of_the_project(file, tmp_path):
    step = yaml.safe_load(file.read_text())["step"]
    if step not in STEPS:
        pytest.skip(f"there is no step {step}")
    sweep = read_sweep(file, tmp_path)
    assert len(sweep.runs) >= 4


def test_the_sweep_of_deepspeed_chat():
    content = yaml.safe_load((REPOSITORY / "scripts" / "sweeps" / "dpo.yaml").read_text())
    assert content["grid"] == {"zero_stage": [2, 3], "offload": [True, False]}
