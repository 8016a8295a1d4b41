"""Pairs made of several answers to a prompt: of those in one row, or of the scored answers of several rows."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from utils.data.formats.example import DroppedRow, Example, check_usable
from utils.data.formats.ranked import with_ranked

LEAST = 512  # pairs of a batch, except the last one


def numbered(prompts: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(rows,) numbers from 0, equal for rows whose prompt and source are equal.

    Args:
        prompts, sources: (rows,) integers.
    """
    if not len(prompts):
        return np.zeros(0, dtype=np.int64)
    prompts = np.unique(prompts, return_inverse=True)[1].astype(np.int64)
    pairs = np.asarray(sources, dtype=np.int64) * (prompts.max() + 1) + prompts
    return np.unique(pairs, return_inverse=True)[1]


def by_prompt(chosen: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The row numbers `chosen`, those of a group next to each other, by the first of each group.

    Args:
        groups: (all rows,) number of the group of each row.
    """
    _, first, inverse = np.unique(groups[chosen], return_index=True, return_inverse=True)
    return chosen[np.argsort(first[inverse], kind="stable")]


def pair_batches(
    batches: Iterable[Sequence[Example]], pairs: str, dropped: Counter[str] | None = None
) -> Iterator[list[Example]]:
    """Batches of pairs from batches of examples in which those of a prompt follow each other (`by_prompt`).

    Single answers of a prompt are compared with each other; a row that holds several answers, or a pair, stands alone.
    Answers of equal scores, and equal answers, make no pair.

    Args:
        pairs: "best_worst" for one pair of each comparison, or "all": then the pairs keep the number "group".
        dropped: counts the prompts that make no pair, by reason.
    """
    dropped = Counter() if dropped is None else dropped
    made: list[Example] = []
    for _, examples in itertools.groupby(itertools.chain.from_iterable(batches), key=_prompt_of):
        for example in _compared(list(examples)):
            try:
                check_usable(example, "preference")
            except DroppedRow as reason:
                dropped[str(reason)] += 1
                continue
            made += _all_pairs(example) if pairs == "all" else [_without(example, "group")]
        if len(made) >= LEAST:
            yield made
            made = []
    if made:
        yield made


def _prompt_of(example: Example) -> tuple[int, float]:
    return example.source, example.numbers["group"]


def _compared(examples: Sequence[Example]) -> Iterator[Example]:
    """The examples of a prompt, with one that ranks all single answers in place of these."""
    answers = [example for example in examples if example.rejected is None and not example.ranked]
    yield from (example for example in examples if example.rejected is not None or example.ranked)
    if answers:
        yield with_ranked(answers[0], [(example.chosen, example.score) for example in answers])


def _all_pairs(example: Example) -> Iterator[Example]:
    """A pair of each better and each worse answer, the best answers first; a pair without `ranked` as it is."""
    if not example.ranked:
        yield example
        return
    ordered = sorted(example.ranked, key=lambda answer: -answer[1])
    for (better, high), (worse, low) in itertools.combinations(ordered, 2):
        if high > low and better != worse:
            yield replace(example, chosen=better, rejected=worse, ranked=())


def _without(example: Example, name: str) -> Example:
    numbers = {known: number for known, number in example.numbers.items() if known != name}
    return replace(example, numbers=numbers, ranked=())
