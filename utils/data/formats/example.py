"""One row of any data set before tokenisation, and what each purpose requires of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Purpose = Literal["sft", "preference", "labelled", "prompts", "pretrain"]
PromptForm = Literal["raw", "dialogue"]  # of a prompt that is text: used unchanged, or a question to render
Row = dict[str, Any]
Turn = tuple[str, str]  # (speaker, text), speaker one of "System", "Human", "Assistant"


@dataclass(frozen=True)
class Example:
    """A prompt, and answers to it.

    `prompt` is a dialogue, or text that is used unchanged. After a dialogue `chosen` and `rejected` are bare answers
    without surrounding white space; after text they are its continuations, including a leading space. Plain text to be
    learned as a whole is the continuation of an empty prompt. A row that is only a prompt has no answer.

    Attributes:
        chosen: a wanted answer. rejected: an unwanted one.
        label: of a row with one answer that was judged alone (KTO): true where it is `chosen`, false where `rejected`.
        score: the row's score of its answer, or the one that `--score_column` names.
        ranked: several answers to the prompt, each with a number that is higher the better it is, in the row's order;
            `chosen` and `rejected` are the best and the worst of them.
        reference: the right answer, for rewards that compare with it.
        columns: the row's other columns.
        numbers: what a prepared row keeps of its columns beside the token ids, by name: see `arrow_rows.NUMBERS`.
        parsed: the turns of a prompt that is the text of a dialogue, for a chat template; None if it stays as it is.
        where: file and line of the row. published: of a published set, in which rows that cannot be used are left out.
        is_undecided: the prompt is text, and only the data set as a whole shows whether it is a question or a finished
            prompt; see `dialogue.settled`. The answers are those of the row, unchanged.
        source: its source, counted from 0 in the order of the flags.
    """

    prompt: str | tuple[Turn, ...]
    chosen: str | None = None
    rejected: str | None = None
    label: bool | None = None
    score: float | None = None
    ranked: tuple[tuple[str, float], ...] = ()
    reference: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    is_undecided: bool = False
    parsed: tuple[Turn, ...] | None = field(default=None, compare=False)
    where: str = field(default="", compare=False)
    published: bool = field(default=False, compare=False)
    source: int = 0


class RowError(ValueError):
    """A row cannot be read. The message says what was found and what was expected; the reader adds file and line."""


class NoResponseError(RowError):
    """A row is well formed but holds no response: an error in a file of the user's own, dropped in a published set."""


class DroppedRow(Exception):
    """A row without use for training is left out. The message is the reason in a few words, counted and logged."""


def check_usable(example: Example, purpose: Purpose) -> None:
    """Raise DroppedRow if `purpose` leaves the example out, NoResponseError if it lacks a response that it needs."""
    if purpose == "prompts":
        return
    if purpose == "preference":
        if example.ranked and example.rejected is None:
            raise DroppedRow("with a single answer" if len(example.ranked) == 1 else "with a tie")
        if example.chosen is None or example.rejected is None:
            raise NoResponseError("has no pair of a chosen and a rejected response")
        if example.chosen == example.rejected:
            raise DroppedRow("whose chosen equals its rejected response")
    elif purpose == "labelled":
        if example.label is None:
            raise NoResponseError("has no `label` (true or false) of its response")
    elif example.chosen is None:
        if example.rejected is None:
            raise NoResponseError("has no response")
        raise DroppedRow("with a response labelled undesirable")
