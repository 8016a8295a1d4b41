"""What became of the rows of each source: read, divided, left out, cut, and how long those are that remain."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Part = Literal["train", "eval"]
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
# The columns of prepared rows, by the names that their lengths have in the report.
_COLUMNS = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids", "response": "response_ids"}


@dataclass
class Tally:
    """Counts of a source.

    Attributes:
        unusable: rows that cannot be used for this purpose, by reason, whichever step they belong to.
        filtered: rows of this step that its filters left out, by reason.
        cut: what was cut to fit the longest row, or left out because only that would remain.
        form: dialogues that their form left out or did not reach (`token_rows.LEFT_OUT`, `WITHOUT_SYSTEM`).
        rows: prepared rows. lengths: tokens of each part ("prompt", "response", ...) of the prepared rows.
    """

    unusable: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    form: Counter[str] = field(default_factory=Counter)
    rows: Counter[Part] = field(default_factory=Counter)
    lengths: dict[Part, dict[str, array]] = field(default_factory=lambda: {"train": {}, "eval": {}})

    def add(self, part: Part, row: Mapping[str, Any]) -> None:
        """Count a prepared row."""
        self.rows[part] += 1
        for name, length in lengths_of(row).items():
            self.lengths[part].setdefault(name, array("I")).append(length)

    def report(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "unusable": _positive(self.unusable),
            "filtered": _positive(self.filtered),
            "cut": _positive(self.cut),
            "form": _positive(self.form),
            "training_rows": self.rows["train"],
            "held_out_rows": self.rows["eval"],
            "tokens": tokens_report([self]),
        }


def lengths_of(row: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of the parts of a prepared row. Those of a response include its EOS."""
    if "input_ids" in row:
        start = row["response_start"]
        return {"prompt": start, "response": len(row["input_ids"]) - start}
    return {name: len(row[column]) for name, column in _COLUMNS.items() if column in row}


def counted_rows(
    rows: Iterable[tuple[int, dict[str, Any]]], part: Part, tallies: Sequence[Tally]
) -> Iterator[dict[str, Any]]:
    """The prepared rows, each given with its source, under which it is counted."""
    for source, row in rows:
        tallies[source].add(part, row)
        yield row


def total(counters: Iterable[Counter[str]]) -> Counter[str]:
    """The sum of the counters."""
    return sum(counters, Counter())


def tokens_report(tallies: Sequence[Tally]) -> dict[str, dict[str, dict[str, float]]]:
    """{"training": {"prompt": {"mean", "p50", ..., "longest"}, ...}, "held_out": ...} over the sources."""
    result = {}
    for part, label in (("train", "training"), ("eval", "held_out")):
        names = dict.fromkeys(name for tally in tallies for name in tally.lengths[part])
        result[label] = {
            name: _summary(np.concatenate([np.asarray(tally.lengths[part].get(name, ())) for tally in tallies]))
            for name in names
        }
    return result


def _summary(lengths: np.ndarray) -> dict[str, float]:
    percentiles = zip(PERCENTILES, np.percentile(lengths, PERCENTILES).tolist(), strict=True)
    values = {"mean": round(float(lengths.mean()), 2)} | {f"p{percent}": value for percent, value in percentiles}
    return values | {"longest": int(lengths.max())}


def _positive(counter: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in counter.items() if count}
