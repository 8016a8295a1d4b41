"""Blending by weights: how many rows each source gives to an epoch, and which ones.

An epoch is as long as the source that is scarcest for its weight allows without repeating a row: that source is read
once, the others give as many rows as their weights ask for and go on with their other rows in the next epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def rows_per_epoch(rows: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The rows that each source gives to an epoch: its weight times the longest epoch that repeats no row.

    Every source gives at least one row. The weights need not sum to 1.

    Args:
        rows: of each source, at least 1. weights: of each source, above 0.
    """
    length = min(count / weight for count, weight in zip(rows, weights, strict=True))
    return [min(count, max(1, round(length * weight))) for count, weight in zip(rows, weights, strict=True)]


@dataclass(frozen=True)
class Blend:
    """Sources that lie one after the other in a table of rows.

    Attributes:
        rows: of each source. per_epoch: how many of them an epoch has.
    """

    rows: tuple[int, ...]
    per_epoch: tuple[int, ...]

    def rows_of(self, epoch: int) -> np.ndarray:
        """The numbers of the rows of an epoch (counted from 0), in random order.

        Each source begins where the previous epoch stopped, and again at its first row after its last: over the epochs
        its rows are seen equally often, give or take one.
        """
        chosen, start = [], 0
        for rows, count in zip(self.rows, self.per_epoch, strict=True):
            chosen.append(start + (epoch * count + np.arange(count)) % rows)
            start += rows
        return np.random.RandomState(epoch).permutation(np.concatenate(chosen))
