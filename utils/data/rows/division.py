"""How the rows of a step's sources are divided, and which of them are held out and trained on."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.data.rows.blending import rows_per_epoch
from utils.data.sources.corpus import Corpus, Share
from utils.data.sources.splits import divide
from utils.errors import InputError, counted

HELD_OUT_SHARE = 0.05  # of the rows of a source that comes without held-out rows


@dataclass
class Division:
    """How the rows of a source were divided: `parts` counts the `train` rows held out, then those of each step.

    With weights: how many training rows were prepared for this step, and how many an epoch has.
    """

    train: int
    held_out: int
    parts: list[int] = field(default_factory=list)
    prepared: int = 0
    per_epoch: int = 0

    def report(self, share: Share) -> dict[str, Any]:
        """Its part of `data_report.json`."""
        names = [f"step {step}" for step in range(1, len(self.parts))] if len(share.weights) > 1 else ["this step"]
        return {
            "source": share.source.label,
            "rows": self.train + self.held_out,
            "held_out": self.held_out or self.parts[0],
            "divided": dict(zip(names, self.parts[1:], strict=True)),
            "this_step": self.parts[1 + share.part],
        } | ({"weight": share.blend_weight, "rows_per_epoch": self.per_epoch} if share.blend_weight is not None else {})

    def line(self, share: Share, corpus: Corpus) -> str:
        """The line about it in the log."""
        mine = self.parts[1 + share.part]
        text = f"{share.source.label}: {counted(self.train + self.held_out, 'row')}, "
        text += f"{self.held_out or self.parts[0]} held out"
        if mine < self.train - self.parts[0]:
            others = ", ".join(
                f"{count} to step {step}"
                for step, count in enumerate(self.parts[1:], 1)
                if count and step != share.part + 1
            )
            text += f"; --data_split {corpus.data_split} gives {mine} to this step, {others}"
        if share.blend_weight is not None:
            text += f"; weight {share.blend_weight:g}: {self.per_epoch} of {self.prepared} training rows in each epoch"
        return text + share.source.remark


def choose(
    corpus: Corpus,
    divisions: Sequence[Division],
    prompts: np.ndarray,
    dropped: Counter[str],
    repeated: Counter[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to train on and to hold out, over all sources, shuffled.

    Purpose "prompts" keeps one row for each distinct prompt; repeats are counted in `repeated`.
    """
    train, held_out, start, known = [], [], 0, {}
    for share, source in zip(corpus.shares, divisions, strict=True):
        own_rows = prompts[start : start + source.train]
        held_out_share = 0.0 if source.held_out else HELD_OUT_SHARE
        others = known if len(share.weights) > 1 else None  # a source that is not divided takes all of its rows
        try:
            kept, *parts = divide(
                own_rows, share.weights, seed=corpus.seed, held_out_share=held_out_share, known=others
            )
        except ValueError as error:
            remarks = f" ({listed(dropped)})" if any(dropped.values()) else ""
            raise InputError(
                f"{share.source.label}: {counted(len(np.unique(own_rows)), 'prompt')} in "
                f"{counted(source.train, 'usable row')}{remarks} are too few: one is held out and every part of "
                "--data_split needs one; give more data, or 0 for the parts that are not needed"
            ) from error
        source.parts = [len(kept), *map(len, parts)]
        behind = start + source.train
        train.append(start + parts[share.part])
        held_out.append(np.concatenate([start + kept, behind + np.arange(source.held_out)]))
        start = behind + source.held_out
    shuffle = np.random.RandomState(corpus.seed)
    chosen = [shuffle.permutation(np.concatenate(numbers)) for numbers in (train, held_out)]
    if corpus.purpose == "prompts":
        chosen = [_distinct(numbers, prompts, repeated) for numbers in chosen]
    return chosen[0], chosen[1]


def one_source_after_the_other(
    numbers: np.ndarray, divisions: Sequence[Division], prepare: Callable[[np.ndarray], Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The prepared rows of the examples with these numbers, by source, each in the given order; counted in it."""
    for source, own in zip(divisions, by_source(numbers, divisions), strict=True):
        for row in prepare(own):
            source.prepared += 1
            yield row


def by_source(numbers: np.ndarray, divisions: Sequence[Division]) -> list[np.ndarray]:
    """The numbers of each source's examples, in the given order."""
    ends = np.cumsum([source.train + source.held_out for source in divisions])
    owners = np.searchsorted(ends, numbers, side="right")
    return [numbers[owners == place] for place in range(len(divisions))]


def set_rows_per_epoch(corpus: Corpus, divisions: Sequence[Division]) -> None:
    """Raises InputError for a source with a weight and without a row."""
    weighted = []
    for share, source in zip(corpus.shares, divisions, strict=True):
        source.per_epoch = source.prepared
        if share.blend_weight is not None:
            weighted.append((source, share.blend_weight))
            if not source.prepared:
                raise InputError(
                    f"{share.source.label}: has a weight of {share.blend_weight:g}, but no training row for this step; "
                    "leave it out, or give more data"
                )
    sources, weights = zip(*weighted, strict=True)
    for source, rows in zip(sources, rows_per_epoch([source.prepared for source in sources], weights), strict=True):
        source.per_epoch = rows


def _distinct(numbers: np.ndarray, prompts: np.ndarray, repeated: Counter[str]) -> np.ndarray:
    """The first of the examples with each prompt, in their order."""
    _, first = np.unique(prompts[numbers], return_index=True)
    repeated["that repeat a prompt"] += len(numbers) - len(first)
    return numbers[np.sort(first)]


def listed(reasons: Counter[str]) -> str:
    """The reasons in words, each behind its number of rows."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "none was dropped"
