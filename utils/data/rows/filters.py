"""Which rows a step leaves out because the user's flags say so. Nothing here splits words or knows a language.

Filters do not change the division of the data: a row that is left out keeps its place among the rows that are divided,
so that no step sees the rows of another, whichever filters each of them has.
"""

import dataclasses
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from utils.arguments.steps import StepConfig
from utils.data.formats.dialogue import DEFAULT_FORM, FORMS, rendered
from utils.data.formats.example import Example, Purpose
from utils.data.rows.duplicates import find_duplicates
from utils.data.rows.report import Tally

BATCH = 1000
REPEATS = "that repeat another training row"
LEAKS = "that repeat a held-out row"
# Letters and symbols that show nothing: Hangul fillers and the empty Braille pattern.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """The flags of these names; see `utils.arguments.data`. The defaults leave out nothing."""

    deduplicate: str = "none"
    min_response_tokens: int = 0
    max_row_tokens: int | None = None
    drop_truncated: bool = False
    drop_empty: bool = False

    @staticmethod
    def of(config: StepConfig) -> "Filters":
        """The filters of a step. One that the step has no flag for is off."""
        names = (field.name for field in dataclasses.fields(Filters) if hasattr(config, field.name))
        return Filters(**{name: getattr(config, name) for name in names})

    def active(self) -> dict[str, Any]:
        """The filters that are on, by name."""
        values = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return {name: value for name, value, default in values if value != default}

    def reason_to_skip(self, example: Example, purpose: Purpose) -> str:
        """Why `--drop_empty` leaves the example out, in a few words that follow a number of rows; "" if it does not."""
        if not self.drop_empty:
            return ""
        answers = [_visible(text) for text in parts_of(example, purpose)[1:]]
        question = example.prompt if isinstance(example.prompt, str) else example.prompt[-1][1]
        if not all(answers) or (purpose == "prompts" and not _visible(question)):
            return "in which nothing is visible"
        if purpose == "preference" and len(answers) > 1 and len(set(answers)) == 1:
            return "whose answers differ in nothing visible"
        return ""

    def reason_to_drop(self, prompt: int, responses: Sequence[int], max_len: int | None = None) -> str:
        """Why a row of so many tokens is left out, in a few words that follow a number of rows; "" if it is not.

        Args:
            responses: tokens of each response, with its EOS.
            max_len: tokens to which longer rows are cut; None for rows that are divided instead.
        """
        tokens = prompt + max(responses, default=0)
        if responses and min(responses) - 1 < self.min_response_tokens:
            return f"with a response of fewer than {self.min_response_tokens} tokens"
        if self.max_row_tokens is not None and tokens > self.max_row_tokens:
            return f"of more than {self.max_row_tokens} tokens"
        if self.drop_truncated and max_len is not None and tokens > max_len:
            return f"that would be cut to {max_len} tokens"
        return ""


def parts_of(example: Example, purpose: Purpose) -> tuple[str, ...]:
    """The texts that make two rows of a purpose the same row: the prompt, and the answers that are trained on.

    An answer with a label (KTO) comes with that label: one answer that was judged in both ways is no repetition. A row
    of several ranked answers has all of them, one of a single scored answer that one. A prompt for PPO stands alone.
    Dialogues are rendered in the project's own form, whichever form they are trained in.
    """
    example = rendered(example, FORMS[DEFAULT_FORM])
    answers = {
        "preference": [text for text, _ in example.ranked]
        or [answer for answer in (example.chosen, example.rejected) if answer is not None],
        "labelled": (example.chosen if example.label else example.rejected, str(example.label)),
        "prompts": (),
    }.get(purpose, (example.chosen,))
    return (example.prompt, *(answer or "" for answer in answers))


def without_duplicates(
    train: np.ndarray,
    held_out: np.ndarray,
    read: Callable[[np.ndarray], list[Example]],
    purpose: Purpose,
    filters: Filters,
    tallies: Sequence[Tally],
) -> np.ndarray:
    """`train` without rows that repeat a held-out row or an earlier training row, in the same order.

    All held-out rows stay: a model is measured on the same ones with and without the filter. Of equal training rows the
    one with the lowest number stays.

    Args:
        train, held_out: numbers of examples. read: the examples with these numbers.
        tallies: count the rows that are left out, by source.
    """
    order = np.concatenate([held_out, np.sort(train)])

    def parts(places: Sequence[int]) -> list[tuple[str, ...]]:
        return [parts_of(example, purpose) for example in read(order[np.asarray(places)])]

    is_near = filters.deduplicate == "near"
    repeats = find_duplicates(parts, len(order), near=is_near, protected=len(held_out))
    gone = np.flatnonzero(repeats >= 0)
    for start in range(0, len(gone), BATCH):
        some = gone[start : start + BATCH]
        for example, original in zip(read(order[some]), repeats[some], strict=True):
            tallies[example.source].filtered[LEAKS if original < len(held_out) else REPEATS] += 1
    return train[~np.isin(train, order[gone])]


def _visible(text: str) -> str:
    """`text` in one spelling (NFC), its white space as single spaces, without what shows nothing."""
    shown = "".join(
        " " if character.isspace() else character
        for character in unicodedata.normalize("NFC", text)
        if character.isspace() or (unicodedata.category(character)[0] != "C" and character not in _BLANK)
    )
    return " ".join(shown.split())
