"""Reductions over real ranks."""

import pytest
import torch
from processes import run_ranks


def reduce_everything():
    from utils import distributed

    rank = distributed.rank()
    values = torch.tensor([1.0, 10.0 * rank], dtype=torch.float64)
    results = [distributed.all_reduce(values, op).tolist() for op in ("sum", "mean", "max", "min")]
    assert values.tolist() == [1.0, 10.0 * rank]  # the argument is left alone
    reduced = distributed.all_reduce_dict({"a": rank, "b": 2.5})
    return results, distributed.all_reduce_scalar(rank + 0.5), reduced, distributed.is_main(), distributed.world_size()


def test_reductions_over_two_ranks():
    first, second = run_ranks(reduce_everything, 2)
    assert first[:3] == second[:3]
    assert first[0] == [[2.0, 10.0], [1.0, 5.0], [1.0, 10.0], [1.0, 0.0]]
    assert first[1] == 2.0 and first[2] == {"a": 1.0, "b": 5.0}
    assert (first[3], second[3], first[4]) == (True, False, 2)


def fail_on_one_rank():
    from utils import distributed

    if distributed.rank() == 1:
        raise ValueError("broken on purpose")


def test_a_failing_rank_fails_the_test():
    with pytest.raises(AssertionError, match="broken on purpose"):
        run_ranks(fail_on_one_rank, 2)


def test_seeds_reach_every_generator():
    import random

    import numpy

    from utils.distributed import seed_everything

    draws = []
    for _ in range(2):
        seed_everything(5)
        draws.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
