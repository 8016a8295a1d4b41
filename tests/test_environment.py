"""What every test may count on."""

import os

import torch
from processes import run_ranks


def sees_a_gpu() -> tuple[str, bool]:
    return os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.is_available()


def test_only_tests_marked_for_it_see_a_gpu(monkeypatch):
    assert sees_a_gpu() == ("", False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert run_ranks(sees_a_gpu, 1) == [("", False)], "ranks of a test are joined through gloo"
