"""The lines with which a run begins."""

import pytest
from step_scripts import flags, load_step, run_step, step_config

from utils.models.checks import check_models
from utils.runs.opening import opening_lines


def lines_of(world, step: int, **changes) -> list[str]:
    config = step_config(world, step, **changes)
    return list(opening_lines(load_step(step).plan_of(config, check_models(config), 200, 1)))


def test_supervised_fine_tuning(world):
    changes = {"max_steps": 0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_seq_len": 64}
    changes |= {"learning_rate": 1e-3, "num_warmup_steps": 3, "output_dir": "out", "dtype": "bf16", "save_interval": 5}
    lines = lines_of(world, 1, seed=7, zero_stage=2, **changes)
    assert lines[0].startswith("step 1: SFT on 1 process (") and lines[0].endswith("), bf16, seed 7")
    assert lines[1] == f"model: {world['model']}, llama of 39,072 parameters, all trained, ZeRO 2"
    assert lines[2] == (
        "13 optimiser steps of 16 rows (1 x 8 x 2), up to 1,024 tokens; learning rate 0.001 (cosine, 3 of warm-up)"
    )
    assert lines[3] == (
        "output: out, weights in bfloat16 (they were read from float32), a checkpoint every 5 optimiser steps"
    )
    assert len(lines) == 4


def test_ppo(world):
    changes = {
        "max_steps": 0,
        "actor_lora_dim": 4,
        "only_optimize_lora": True,
        "critic_warmup_steps": 2,
        "dtype": "fp32",
    }
    changes |= {"per_device_generation_batch_size": 8, "generation_batches": 2, "per_device_training_batch_size": 4}
    lines = lines_of(world, 3, output_dir=None, actor_learning_rate=1e-5, critic_learning_rate=5e-6, **changes)
    assert [line.split(":")[0] for line in lines[1:4]] == ["actor", "critic", "reward"]
    assert "LoRA 4, " in lines[1] and " trained, ZeRO 0" in lines[1] and lines[3].endswith("parameters, frozen")
    assert lines[4].startswith("12 rollouts of 16 prompts; optimiser steps of 4 rows (1 x 4 x 1), up to ")
    assert lines[5].startswith("optimiser steps: actor 40 at 1e-05 (LoRA 0.0005), critic 48 at 5e-06 (cosine, ")
    assert lines[6] == "output: none, since no --output_dir is given"


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_begins_with_them(world, tmp_path, capsys, step):
    run_step(step, flags(world, step, tmp_path))
    printed = capsys.readouterr().out
    assert f"step {step}: " in printed and f"output: {tmp_path}, weights in " in printed
    assert printed.index("output: ") < printed.index("loading the ")
