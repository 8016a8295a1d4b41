"""What a resumed run may do with each flag: as in version 0.1, which had lists of names for it."""

from typing import get_args

import pytest

from utils.arguments.base import Resume, known_flags
from utils.arguments.steps import CONFIGS as BY_FOLDER

CONFIGS = tuple(BY_FOLDER.values())
FREE = {
    *("output_dir", "data_output_path", "tensorboard_path", "enable_tensorboard", "verbose", "logging_interval"),
    *("save_interval", "save_total_limit", "resume_from_checkpoint", "keep_best", "save_adapter", "on_nan"),
    *("max_steps", "num_train_epochs", "enable_test_mode", "test_stop_step", "eval_interval"),
    *("stall_timeout", "print_loss", "print_answers", "print_answers_interval", "release_inference_cache"),
    *("local_rank", "deepspeed", "compute_fp32_loss", "preprocessing_num_workers", "num_padding_at_beginning"),
}
ROWS = {  # numbers of rows, and what they are multiplied with
    "per_device_train_batch_size": ("gradient_accumulation_steps",),
    "per_device_training_batch_size": ("gradient_accumulation_steps",),
    "per_device_generation_batch_size": ("generation_batches",),
}
REGROUP = {*ROWS, *(name for names in ROWS.values() for name in names)}
REGROUP |= {"zero_stage", "actor_zero_stage", "critic_zero_stage"}


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_flag_says_what_a_resumed_run_may_do_with_it(config_class):
    kinds = {name: known.resume for name, known in known_flags(config_class).items()}
    assert set(kinds.values()) == set(get_args(Resume))
    assert {name for name, kind in kinds.items() if kind == "free"} == FREE & kinds.keys()
    assert {name for name, kind in kinds.items() if kind == "regroup"} == REGROUP & kinds.keys()
    rows_with = {name: known.rows_with for name, known in known_flags(config_class).items() if known.rows_with}
    assert rows_with == {name: others for name, others in ROWS.items() if name in kinds}


def test_no_flag_of_those_lists_is_gone():
    flags = {name for config_class in CONFIGS for name in known_flags(config_class)}
    assert flags >= FREE | REGROUP
