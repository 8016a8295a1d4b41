"""Random numbers continue where they were saved, also those of generators that no step uses at present."""

import random

import numpy as np
import torch
from processes import run_ranks

from utils.checkpoints.random_state import random_state, set_random_state


def draw() -> tuple[float, ...]:
    """One number of each generator, then a normal one: python and numpy draw two of these and keep one for later."""
    uniform = (random.random(), float(np.random.random()), torch.rand(()).item())
    return (*uniform, random.gauss(0, 1), float(np.random.normal()), torch.randn(()).item())


def test_every_generator_goes_on_where_it_was():
    draw()
    tensors, texts = random_state()
    expected = [draw(), draw()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    set_random_state(tensors, texts)
    assert [draw(), draw()] == expected


def first_numbers_of_a_rank() -> list[float]:
    """Those of a new run, after its models were built with the same numbers on all ranks."""
    from utils.arguments import SftConfig
    from utils.checkpoints import Checkpoints
    from utils.parallel import distributed

    config = SftConfig(model_name_or_path="m", seed=3)
    distributed.seed_everything(config.seed)
    before = torch.rand(()).item()
    Checkpoints(config, total_steps=5, data_keys=[]).resume({})
    return [before, torch.rand(()).item()]


def test_ranks_draw_dropout_masks_of_their_own():
    first, second = run_ranks(first_numbers_of_a_rank, 2)
    assert first[0] == second[0] and first[1] != second[1]
    assert run_ranks(first_numbers_of_a_rank, 2) == [first, second]
