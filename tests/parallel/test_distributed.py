"""Reductions over real ranks."""

import pytest
import torch
from processes import run_ranks

from utils.errors import InputError
from utils.parallel import distributed
from utils.parallel.distributed import derived_seed


def reduce_everything():
    from utils.parallel import distributed

    rank = distributed.rank()
    values = torch.tensor([1.0, 10.0 * rank], dtype=torch.float64)
    results = [distributed.all_reduce(values, op).tolist() for op in ("sum", "max", "min")]
    assert values.tolist() == [1.0, 10.0 * rank]  # the argument is left alone
    reduced = distributed.all_reduce_dict({"a": rank, "b": 2.5})
    return results, distributed.all_reduce_scalar(rank + 0.5), reduced, distributed.is_main(), distributed.world_size()


def test_reductions_over_two_ranks():
    first, second = run_ranks(reduce_everything, 2)
    assert first[:3] == second[:3]
    assert first[0] == [[2.0, 10.0], [1.0, 10.0], [1.0, 0.0]]
    assert first[1] == 2.0 and first[2] == {"a": 1.0, "b": 5.0}
    assert (first[3], second[3], first[4]) == (True, False, 2)


def time_limits() -> list[float]:
    """Minutes that a collective may take, of every group that a run with shared decoding has."""
    import deepspeed

    from utils.generation.tensor_parallel import join_shard_group
    from utils.parallel import distributed

    join_shard_group(2)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    settings |= {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    with distributed.quiet():
        engine = deepspeed.initialize(model=torch.nn.Linear(2, 1), config=settings)[0]
    engine.backward(engine(torch.ones(1, 2, dtype=torch.bfloat16)).sum())
    engine.step()
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60 for group in groups]


def test_every_group_has_the_time_limit_of_the_run():
    assert run_ranks(time_limits, 2) == [[60.0] * 3] * 2  # all processes, DeepSpeed's ones, those that decode together


def fail_on_one_rank():
    from utils.parallel import distributed

    if distributed.rank() == 1:
        raise ValueError("broken on purpose")


def test_a_failing_rank_fails_the_test():
    with pytest.raises(AssertionError, match="broken on purpose"):
        run_ranks(fail_on_one_rank, 2)


def test_seeds_reach_every_generator():
    import random

    import numpy

    from utils.parallel.distributed import seed_everything

    draws = []
    for _ in range(2):
        seed_everything(5)
        draws.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_derived_seeds_differ_where_a_sum_would_not():
    """Rollout i of seed 1235 is not rollout i + 1 of seed 1234."""
    seeds = {derived_seed(seed, step) for seed in range(1234, 1300) for step in range(100)}
    assert len(seeds) == 66 * 100 and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1234, 1) == 5127198388207649116 != derived_seed(1, 1234)


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC version: gcc 12\n"


def test_a_gpu_whose_driver_is_too_old_is_not_left_aside_in_silence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(distributed, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    distributed.check_driver()  # no GPU
    (tmp_path / "version").write_text(DRIVER)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        InputError, match=r"CUDA 13.0\) cannot use .* NVIDIA driver 535.129.03, which must be 580 or newer"
    ):
        distributed.check_driver()
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        distributed.check_driver()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        distributed.check_driver()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(torch.version, "cuda", None)
    distributed.check_driver()
    warning = capsys.readouterr().err
    assert "NVIDIA driver 535.129.03, but torch" in warning and warning.count("\n") == 1
