"""A run that was stopped and resumed is the run that was not: weights, optimiser, metrics, bit for bit."""

import shutil
from pathlib import Path

import pytest
from checkpoint_contents import same, state_of
from processes import run_ranks
from safetensors.torch import load_file
from step_scripts import StepName, flags, run_step, write_rows

from utils.output.metrics import read_metrics

STEPS_BEFORE, STEPS = (
    {1: 3, 2: 3, "dpo": 3, 3: 2},
    {1: 7, 2: 7, "dpo": 7, 3: 3},
)  # epochs of 5 (step 3: 4, of 2 on two ranks) end between


def changes_of(step: StepName, *, stage: int, lora: int, dtype: str = "fp32", **others) -> dict:
    """Flags that use every kind of state: dropout, momentum, schedule, KL controller, average, text."""
    shared = {"max_steps": STEPS[step], "save_interval": STEPS_BEFORE[step], "save_total_limit": 0, "dtype": dtype}
    shared |= others
    if step != 3:
        rates = {"zero_stage": stage, "lora_dim": lora, "dropout": 0.2, "eval_interval": 2, "num_warmup_steps": 2}
        return shared | rates | ({"lora_dropout": 0.2} if lora else {})
    shared |= {"actor_zero_stage": stage, "critic_zero_stage": stage, "actor_lora_dim": lora, "critic_lora_dim": lora}
    shared |= {"enable_ema": True, "kl_target": 0.5, "kl_horizon": 20, "ppo_epochs": 2, "actor_learning_rate": 1e-3}
    return shared | {"eval_interval": 1, "keep_best": True, "per_device_generation_batch_size": 4}


def rows_of(folder: Path) -> list[dict]:
    """The rows of a run without what depends on the clock."""
    clocks = ("time", "time/", "throughput/", "train/response_tokens_per_second", "train/pairs_per_second")
    clocks += ("train/rows_per_second",)
    return [
        {name: value for name, value in row.items() if not name.startswith(clocks)}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def cut_and_resume(world: dict, step: StepName, folder: str, changes: dict) -> None:
    """Run to the end; restore the files to those after `STEPS_BEFORE`, as a kill leaves them; resume; compare."""
    from utils.parallel import distributed

    whole, cut = Path(folder) / "whole", Path(folder) / "cut"
    expected = run_step(step, flags(world, step, whole, **changes))
    if distributed.is_main():
        first = f"checkpoints/checkpoint-{STEPS_BEFORE[step]}"
        shutil.copytree(whole / first, cut / first)
        shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")  # with rows that came after the checkpoint
        if step == 3:
            shutil.copytree(whole / "best", cut / "best")
    distributed.barrier()
    found = run_step(step, flags(world, step, cut, resume_from_checkpoint="auto", **changes))
    expected.pop("train_seconds"), found.pop("train_seconds")
    assert found == expected
    last = f"checkpoints/checkpoint-{STEPS[step]}"
    same(state_of(whole / last), state_of(cut / last))
    assert rows_of(whole) == rows_of(cut)
    weights = [path.relative_to(whole) for path in whole.rglob("model*.safetensors")]
    assert len(weights) == (6 if step == 3 else 1)  # step 3: actor, critic, average, and the best of each
    for path in weights:
        same(load_file(whole / path), load_file(cut / path), str(path))


def in_group(world: dict, folder: str, cases: list[tuple[StepName, dict]]) -> None:
    for number, (step, kind) in enumerate(cases):
        cut_and_resume(world, step, f"{folder}/{number}", changes_of(step, **kind))


STREAM = {"stage": 0, "lora": 0, "streaming": True, "shuffle_buffer_size": 7}
ONE_PROCESS = [
    (1, {"stage": 0, "lora": 0}),
    (1, {"stage": 3, "lora": 4}),
    (1, {"stage": 2, "lora": 0, "packing": True, "max_tokens_per_batch": 64, "gradient_accumulation_steps": 2}),
    (1, {"stage": 0, "lora": 4, "dtype": "bf16"}),
    (2, {"stage": 1, "lora": 0}),
    (2, {"stage": 2, "lora": 4}),
    ("dpo", {"stage": 0, "lora": 0, "loss": ["sigmoid", "bco_pair"]}),
    ("dpo", {"stage": 3, "lora": 4, "only_optimize_lora": True, "reference_logprobs": "live"}),
    (3, {"stage": 0, "lora": 0}),
    (3, {"stage": 3, "lora": 4}),
    (1, STREAM | {"packing": True, "max_tokens_per_batch": 64, "gradient_accumulation_steps": 2}),
    (3, STREAM),
]
TWO_PROCESSES = [
    (1, {"stage": 2, "lora": 0, "dtype": "bf16"}),
    (2, {"stage": 3, "lora": 0}),
    ("dpo", {"stage": 2, "lora": 0, "loss": ["kto_pair"]}),
    (3, {"stage": 3, "lora": 4}),
    (3, {"stage": 0, "lora": 0}),
    (1, STREAM | {"gradient_accumulation_steps": 2}),
]
GRID = [{"stage": stage, "lora": lora} for stage in (0, 1, 2, 3) for lora in (0, 4)]


@pytest.mark.parametrize(("step", "kind"), ONE_PROCESS, ids=str)
def test_resumed_run_is_bit_identical(world, tmp_path, step, kind):
    cut_and_resume(world, step, str(tmp_path), changes_of(step, **kind))


def test_resumed_runs_of_two_processes_are_bit_identical(world, tmp_path):
    run_ranks(in_group, 2, world, str(tmp_path), TWO_PROCESSES)


def test_a_run_that_continues_in_another_folder_leaves_none_of_what_another_run_left_there(world, tmp_path):
    """Neither the first bytes of its metrics nor its best model, whatever their scores were."""
    changes = {"max_steps": 4, "save_interval": 2, "eval_interval": 3, "keep_best": True, "num_sample_generations": 0}
    first, other = tmp_path / "first", tmp_path / "other"
    run_step(1, flags(world, 1, first, **(changes | {"learning_rate": 1.0})))
    best_of_other = run_step(1, flags(world, 1, other, **(changes | {"save_interval": 0})))["eval/loss"]
    changes |= {"learning_rate": 1.0, "resume_from_checkpoint": first / "checkpoints" / "checkpoint-2"}
    run_step(1, flags(world, 1, other, **changes))
    rows = rows_of(other)
    assert rows == [row for row in rows_of(first) if row["step"] > 2]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert losses[0] > losses[1] > best_of_other
    assert (other / "best/model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_runs_are_bit_identical_everywhere(world, tmp_path, step, processes):
    run_ranks(in_group, processes, world, str(tmp_path), [(step, kind) for kind in GRID])


def test_text_beside_ppo_continues_where_it_was(world, tmp_path):
    """More text batches than an epoch of them has."""
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"{i}: " + "the milk is white . " * 20} for i in range(6)])
    changes = changes_of(3, stage=0, lora=0) | {"unsupervised_dataset_name": text}
    cut_and_resume(world, 3, str(tmp_path), changes)
