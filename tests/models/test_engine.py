"""Remarks that are made when a model is prepared for training."""

from types import SimpleNamespace

import pytest

from utils.models.engine import _warmup_remark


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "total_steps", "remark"),
    [
        ("cosine", 0, 5, ""),
        ("cosine", 4, 5, ""),
        ("cosine", 5, 5, "never reaches its peak"),
        ("constant_with_warmup", 100, 5, "100 but 5 optimiser steps"),
        ("constant", 4, 5, "has no effect"),
        ("cosine", 100, 0, "never trains"),  # an actor that only watches its critic warm up
    ],
)
def test_a_warmup_that_does_not_do_what_it_is_for(schedule, warmup_steps, total_steps, remark):
    config = SimpleNamespace(lr_scheduler_type=schedule, num_warmup_steps=warmup_steps)
    found = _warmup_remark(config, total_steps)
    assert remark in found and bool(remark) == bool(found)
