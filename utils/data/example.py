"""One row of any data set, as text, and what each purpose asks of it."""

from dataclasses import dataclass
from typing import Any, Literal

Purpose = Literal["sft", "preference", "prompts", "pretrain"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """`prompt` is what the model is given, `chosen` a wanted response, `rejected` an unwanted one.

    The model reads `prompt + chosen`: the response brings its own leading space. Plain text has an empty prompt. A row
    of prompts has no response; a KTO row has one of the two (`chosen` if it is labelled true, `rejected` if false).
    """

    prompt: str
    chosen: str | None = None
    rejected: str | None = None


class RowError(ValueError):
    """A row cannot be read. The message says what was found and what was expected; the reader adds file and line."""


class NoResponseError(RowError):
    """A row is well formed but holds no response: an error in a file of the user's own, dropped in a published set."""


class DroppedRow(Exception):
    """A row that teaches nothing is left out. The message is the reason in a few words, counted and logged."""


def check_usable(example: Example, purpose: Purpose) -> None:
    """Raise DroppedRow if `purpose` leaves the example out, NoResponseError if it lacks a response that it needs."""
    if purpose == "prompts":
        return
    if purpose == "preference":
        if example.chosen is None or example.rejected is None:
            raise NoResponseError("has no pair of a chosen and a rejected response")
        if example.chosen == example.rejected:
            raise DroppedRow("whose chosen equals its rejected response")
    elif example.chosen is None:
        if example.rejected is None:
            raise NoResponseError("has no response")
        raise DroppedRow("with a response labelled undesirable")
