"""Who gets which rows: a held-out share first, the rest divided among the three steps.

Everything depends on the number of rows, the weights and the seed alone, so that the three steps, run one after the
other on the same data, agree on the division and never share a training row.
"""

from collections.abc import Sequence

import numpy as np

from utils.arguments.data import split_weights
from utils.data.formats.example import Purpose
from utils.errors import InputError

PHASES = {"sft": 0, "preference": 1, "prompts": 2}
PHASE_NAMES = ("supervised fine-tuning", "reward model", "PPO")


def phase_weights(data_split: str, purpose: Purpose) -> tuple[tuple[float, ...], int]:
    """The weights to divide rows by and the part that `purpose` takes; "pretrain" takes all rows.

    Raises InputError where `data_split` leaves nothing to the step.
    """
    weights = split_weights(data_split)
    if purpose not in PHASES:
        return (1.0,), 0
    part = PHASES[purpose]
    if weights[part] == 0:
        raise InputError(
            f"--data_split {data_split} leaves no rows for step {part + 1} ({PHASE_NAMES[part]}); "
            "give its number a value above 0"
        )
    return weights, part


def split_sizes(rows: int, weights: Sequence[float]) -> list[int]:
    """Divide `rows` by `weights`: every part of positive weight gets one row, the rest goes by largest remainder.

    The sizes add up to `rows`. Raises ValueError if there are fewer rows than parts of positive weight.
    """
    positive = [weight > 0 for weight in weights]
    if rows < sum(positive):
        raise ValueError(f"{rows} rows cannot fill {sum(positive)} parts")
    quotas = [rows * weight / sum(weights) for weight in weights]
    sizes = [max(int(quota), int(is_positive)) for quota, is_positive in zip(quotas, positive, strict=True)]
    while sum(sizes) != rows:
        step = 1 if sum(sizes) < rows else -1
        candidates = [i for i, size in enumerate(sizes) if positive[i] and size + step >= 1]
        sizes[max(candidates, key=lambda i: step * (quotas[i] - sizes[i]))] += step
    return sizes


def divide(
    rows: int, weights: Sequence[float], part: int, seed: int, held_out_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers of part `part` and those held out, both in random order.

    `held_out_share` of all rows (at least one row; none if the share is 0) is held out from every part; the rest is
    divided by `weights`. Raises ValueError if the rows are too few.
    """
    # RandomState's stream is frozen by numpy's policy: another numpy version gives the same division.
    order = np.random.RandomState(seed).permutation(rows)
    held_out = max(1, round(rows * held_out_share)) if held_out_share > 0 else 0
    sizes = split_sizes(rows - held_out, weights)
    start = held_out + sum(sizes[:part])
    return order[start : start + sizes[part]], order[:held_out]
