"""Which rows go where: a held-out share first, the rest divided among the three steps.

Rows with the same prompt stay together: a held-out answer to a prompt that a step was trained on would not be a fair
test. The division depends only on the prompts, the weights and the seed, so that the three steps, run one after the
other on the same data, agree on it and never share a training prompt.
"""

import hashlib
from collections.abc import MutableMapping, Sequence

import numpy as np

from utils.arguments.data import split_weights
from utils.data.formats.example import Purpose
from utils.errors import InputError

PHASES = {"sft": 0, "preference": 1, "labelled": 1, "prompts": 2}
PHASE_NAMES = ("supervised fine-tuning", "reward model or direct preference", "PPO")


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
    prompts: np.ndarray,
    weights: Sequence[float],
    *,
    seed: int,
    held_out_share: float,
    known: MutableMapping[int, int] | None = None,
) -> list[np.ndarray]:
    """The row numbers of each part, in random order: first those held out, then those of each weight.

    Args:
        prompts: (rows,) a number for the prompt of each row, equal for equal prompts.
        held_out_share: of all rows, held out from every part, at least one; 0 for none. The rest is divided by
            `weights`. Sizes are counted in rows, and met as nearly as whole prompts allow.
        known: the parts of prompts that other sources have already, which they keep; the prompts of this source are
            added.

    Raises:
        ValueError: the distinct prompts are too few.
    """
    known = {} if known is None else known
    distinct, rows_of = _grouped(prompts)
    parts = np.full(len(distinct), -1)
    for index, prompt in enumerate(distinct.tolist()):
        parts[index] = known.get(prompt, -1)
    fresh = np.flatnonzero(parts < 0)
    # RandomState's stream is frozen by numpy's policy: another numpy version gives the same division.
    order = np.random.RandomState(seed).permutation(len(fresh))
    counts = np.array([len(rows_of[index]) for index in fresh[order]], dtype=np.int64)
    if len(fresh) < len(distinct) and len(fresh) <= len(weights):  # too few to divide, and need not be divided
        parts[fresh] = 1 + int(np.argmax(weights))
    else:
        rows = int(counts.sum())
        held_out = max(1, round(rows * held_out_share)) if held_out_share > 0 else 0
        sizes = [held_out, *split_sizes(rows - held_out, weights)]
        ends = _ends(counts, sizes)
        for part, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            parts[fresh[order[start:end]]] = part
    known.update(zip(distinct.tolist(), parts.tolist(), strict=True))
    in_order = np.concatenate([fresh[order], np.setdiff1d(np.arange(len(distinct)), fresh)])
    return [
        np.concatenate([np.zeros(0, dtype=np.int64), *(rows_of[i] for i in in_order[parts[in_order] == part])])
        for part in range(len(weights) + 1)
    ]


def part_of(prompt: int, weights: Sequence[float], *, seed: int, held_out_share: float) -> int:
    """The part of a prompt when each is drawn by itself, as in a stream: 0 held out, else 1 + the index of its weight.

    It depends on the arguments alone: all sources and all steps agree on a prompt, and its part among `weights` is the
    same whatever `held_out_share` is. Shares are those of the weights on average, not exactly.

    Args:
        prompt: the number of the prompt. held_out_share: as in `divide`.
    """
    content = f"{seed} {prompt}".encode()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if int.from_bytes(digest[:8], "little") < held_out_share * 2**64:
        return 0
    drawn, total = int.from_bytes(digest[8:], "little") / 2**64 * sum(weights), 0.0
    last = 0
    for part, weight in enumerate(weights, 1):
        total += weight
        if weight > 0:
            last = part
            if drawn < total:
                break
    return last


def _grouped(prompts: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct prompts in the order in which they first occur, and the rows of each."""
    distinct, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rows = np.argsort(inverse, kind="stable")
    ends = np.cumsum(np.bincount(inverse, minlength=len(distinct)))
    of_each = np.split(rows, ends[:-1]) if len(distinct) else []
    return distinct[order], [of_each[index] for index in order]


def _ends(counts: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """Where to cut a sequence of groups with `counts` members each, so that the pieces have nearly these sizes.

    Every piece of a positive size gets at least one group. Raises ValueError if the groups are too few.
    """
    if len(counts) < sum(size > 0 for size in sizes):
        raise ValueError(f"{len(counts)} prompts cannot fill {sum(size > 0 for size in sizes)} parts")
    total, ends = np.concatenate([[0], np.cumsum(counts)]), []
    target, start = 0, 0
    for place, size in enumerate(sizes):
        target += size
        end = int(np.abs(total - target).argmin())
        later = sum(size > 0 for size in sizes[place + 1 :])
        end = min(max(end, start + (size > 0)), len(counts) - later) if size else start
        ends.append(end)
        start = end
    if any(sizes):
        last = max(place for place, size in enumerate(sizes) if size)
        ends[last:] = [len(counts)] * (len(sizes) - last)
    return ends
