"""Random numbers go on where they were saved, also those that no step of a run happens to draw today."""

import random

import numpy as np
import torch

from utils.checkpoints.random_state import random_state, set_random_state


def draw() -> tuple[float, ...]:
    """Of each generator one number, then a normal one: of these python and numpy make two and keep one for later."""
    uniform = (random.random(), float(np.random.random()), torch.rand(()).item())
    return (*uniform, random.gauss(0, 1), float(np.random.normal()), torch.randn(()).item())


def test_every_generator_goes_on_where_it_was():
    draw()
    tensors, texts = random_state()
    expected = [draw(), draw()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    set_random_state(tensors, texts)
    assert [draw(), draw()] == expected
