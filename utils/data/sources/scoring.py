"""Scores of single answers: which columns hold them, and what a training step makes of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from utils.data.formats.converters import number_in
from utils.data.formats.example import Example, Purpose, RowError
from utils.data.sources.local_files import LocatedRow
from utils.errors import InputError

SUM_DIGITS = 9  # of a weighted sum: 0.1 + 0.2 and 0.3 are the same score


@dataclass(frozen=True)
class Scoring:
    """How rows of one answer are judged.

    Attributes:
        columns: whose weighted sum is an answer's score; higher is better.
        threshold: an answer is desirable from this score on; None where pairs are made of the scores.
    """

    columns: Mapping[str, float]
    threshold: float | None = None

    def is_answer(self, example: Example) -> bool:
        """Whether the example is a single answer of which pairs are to be made, rather than a pair."""
        return self.threshold is None and example.chosen is not None and example.rejected is None and not example.ranked

    def scored(self, example: Example, purpose: Purpose) -> Example:
        """`example`, if it is a single answer, with its score; for purpose "labelled" with a label as well.

        Raises:
            InputError: with file and row, where a score is missing or no finite number.
        """
        if example.label is not None:
            raise InputError(
                f"{example.where}: has a `label`, and --score_column judges answers by their scores; leave the flag out"
            )
        if example.chosen is None or example.rejected is not None or example.ranked:
            return example
        score = sum(weight * self._number(example, column) for column, weight in self.columns.items())
        score = round(score, SUM_DIGITS) if len(self.columns) > 1 else score
        if purpose != "labelled":
            return replace(example, score=score)
        if score >= self.threshold:
            return replace(example, score=score, label=True)
        return replace(example, score=score, label=False, chosen=None, rejected=example.chosen)

    def _number(self, example: Example, column: str) -> float:
        where, columns = example.where, example.columns
        if column not in columns:
            raise InputError(f"{where}: has no column `{column}`, which --score_column names; add it to every row")
        try:
            number = number_in(columns, column)
        except RowError as error:
            raise InputError(f"{where}: {error}; --score_column needs one in every row") from error
        if not math.isfinite(number) or isinstance(columns[column], bool):
            raise InputError(
                f"{where}: `{column}` is {columns[column]}; --score_column needs a finite number in every row"
            )
        return number


def refuse_pairs(scoring: Scoring, first: LocatedRow) -> None:
    """Raise InputError where rows that hold pairs have a column of scores too: it is not known to which answer."""
    where, row = first
    if column := next((column for column in scoring.columns if column in row), None):
        raise InputError(
            f"{where}: the row holds several answers, and --score_column {column} is for rows of one answer; leave the "
            "flag out, or remove the other answers"
        )
