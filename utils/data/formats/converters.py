"""From a row in one of the general formats to an `Example`.

A converter raises RowError for a row that is not what its format promises, NoResponseError for one without a response,
and DroppedRow for one of a kind that the format is known to hold and that has no use for training. Types are checked on
every row: readers silently load columns of mixed types.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from utils.data.formats.dialogue import (
    SPEAKERS,
    answered,
    asked,
    has_own_marker,
    parse_dialogue,
    raw,
    undecided,
    with_turns,
)
from utils.data.formats.example import DroppedRow, Example, NoResponseError, Row, RowError, Turn

# Roles of calls to tools and their results, under the names that data sets use.
TOOL_ROLES = {
    "tool",
    "function",
    "function_call",
    "function_response",
    "observation",
    "tool_call",
    "tool_response",
    "ipython",
}
LABELS = {"true": True, "1": True, "false": False, "0": False}


def require(row: Row, column: str) -> Any:
    """The value in `column`. Raises RowError that names the columns found."""
    if column not in row:
        raise RowError(f"column `{column}` is missing; columns found: {', '.join(sorted(map(str, row)))}")
    return row[column]


def text_in(row: Row, column: str) -> str:
    """The text in `column`, not blank. Raises RowError."""
    value = require(row, column)
    if not isinstance(value, str):
        raise RowError(f"`{column}` must be text, found {_describe(value)}")
    if not value.strip():
        raise RowError(f"`{column}` is empty")
    return value


def response_in(row: Row, column: str) -> str:
    """The response in `column`. Raises NoResponseError where it is null or blank, RowError where it is not text."""
    value = require(row, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise NoResponseError(f"has no response: `{column}` is {'null' if value is None else 'empty'}")
    return text_in(row, column)


def number_in(row: Row, column: str) -> float:
    """The number in `column`, which may be written as text. Raises RowError."""
    value = require(row, column)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RowError(f"`{column}` must be a number, found {_describe(value)}") from None


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def turns_in(value: Any, name: str) -> list[Turn]:
    """A turn, or a list of them: {"role", "content"} (chat) or {"from", "value"} (ShareGPT). Raises RowError."""
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise RowError(f"`{name}` has no turns")
    return [_turn(turn, name) for turn in turns]


def _turn(turn: Any, name: str) -> Turn:
    if not isinstance(turn, dict):
        raise RowError(f"`{name}` must hold turns with role and content (or from and value), found {_describe(turn)}")
    role, content = ("role", "content") if "role" in turn else ("from", "value")
    speaker = SPEAKERS.get(str(turn.get(role)).lower())
    if str(turn.get(role)).lower() in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        what = f"of role {turn[role]!r}" if speaker is None else "with a call to a tool"
        raise RowError(f"`{name}` has a turn {what}: messages of tools are not supported; remove the dialogue")
    if speaker is None:
        raise RowError(f"`{name}` has a turn of unknown role {turn.get(role)!r}; known: {', '.join(SPEAKERS)}")
    if not isinstance(turn.get(content), str):
        raise RowError(f"`{name}` has a turn whose {content} must be text, found {_describe(turn.get(content))}")
    return speaker, turn[content]


def _last_answer(turns: Sequence[Turn], name: str) -> str:
    if not turns or turns[-1][0] != "Assistant":
        raise NoResponseError(f"has no response: `{name}` does not end with an assistant turn")
    if not turns[-1][1].strip():
        raise NoResponseError(f"has no response: the last turn of `{name}` is empty")
    return turns[-1][1]


def _pair(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> Example:
    """A pair from two whole dialogues that differ in their last turn, the assistant's."""
    answers = _last_answer(chosen, "chosen"), _last_answer(rejected, "rejected")
    if list(chosen[:-1]) != list(rejected[:-1]):
        raise DroppedRow("whose dialogues differ before the last turn")
    if not any(speaker == "Human" for speaker, _ in chosen):
        raise RowError("the dialogue has no human turn")
    return answered(chosen[:-1], *answers)


def preference(row: Row) -> Example:
    """prompt/chosen/rejected: text, or chat turns (`chosen` and `rejected` may repeat the prompt's turns)."""
    if isinstance(require(row, "chosen"), list | dict):
        return _chat_preference(row, "prompt")
    return undecided(text_in(row, "prompt"), *(response_in(row, column) for column in ("chosen", "rejected")))


def _chat_preference(row: Row, context_column: str) -> Example:
    chosen, rejected = (turns_in(require(row, column), column) for column in ("chosen", "rejected"))
    if any(speaker == "Human" for speaker, _ in chosen):
        context: list[Turn] = []
    elif isinstance(require(row, context_column), str):
        context = [("Human", text_in(row, context_column))]
    else:
        context = turns_in(row[context_column], context_column)
    return _pair([*context, *chosen], [*context, *rejected])


def conversation_preference(column: str) -> Callable[[Row], Example]:
    """Earlier turns in `column`, the two last answers in `chosen` and `rejected`: turns, or text."""

    def convert(row: Row) -> Example:
        if isinstance(require(row, "chosen"), list | dict):
            return _chat_preference(row, column)
        turns = turns_in(require(row, column), column)
        return answered(turns, *(response_in(row, name) for name in ("chosen", "rejected")))

    return convert


def dialogue_preference(row: Row) -> Example:
    """chosen/rejected as whole dialogues with the same beginning: hh-rlhf's text, or lists of chat turns.

    hh-rlhf holds dialogues whose last turn is open: these are dropped. One without any assistant turn is an error.
    """
    if isinstance(require(row, "chosen"), list | dict):
        return _chat_preference(row, "prompt")
    dialogues = [parse_dialogue(response_in(row, column)) for column in ("chosen", "rejected")]
    for column, turns in zip(("chosen", "rejected"), dialogues, strict=True):
        if not any(speaker == "Assistant" for speaker, _ in turns):
            raise NoResponseError(f"has no response: `{column}` has no `Assistant:` turn")
        if turns[-1] == ("Assistant", ""):
            raise DroppedRow("with an empty last turn")
    return _pair(*dialogues)


def alpaca(row: Row) -> Example:
    """instruction/input/output; a non-empty input follows the instruction on a separate line.

    An instruction that is a whole dialogue up to "Assistant:" (alpaca-rlhf's MultiTurnAlpaca) is used unchanged.
    """
    question, output = _with_input(row), response_in(row, "output")
    return with_turns(raw(question, output)) if has_own_marker(question) else asked(question, output)


def _with_input(row: Row) -> str:
    instruction, extra = text_in(row, "instruction"), row.get("input") or ""
    if not isinstance(extra, str):
        raise RowError(f"`input` must be text, found {_describe(extra)}")
    if not extra.strip():
        return instruction
    if has_own_marker(instruction):
        raise RowError("`input` must be empty where `instruction` is a dialogue that ends with `Assistant:`")
    return f"{instruction}\n{extra}"


def alpaca_preference(row: Row) -> Example:
    """instruction/output_1/output_2/preference, where preference is 1 or 2: the better of the two (AlpacaFarm)."""
    answers = [response_in(row, column) for column in ("output_1", "output_2")]
    better = number_in(row, "preference")
    if better in (0, 1.5):
        raise DroppedRow("with a tie")
    if better not in (1, 2):
        raise RowError(f"`preference` must be 1 or 2, found {_describe(row['preference'])}")
    ordered = answers if better == 1 else reversed(answers)
    question = _with_input(row)
    if has_own_marker(question):
        return with_turns(raw(question, *(f" {answer.strip()}" for answer in ordered)))
    return asked(question, *ordered)


def conversation(column: str) -> Callable[[Row], Example]:
    """A dialogue in `column`; its last answer is the response, wanted or unwanted according to a `label` (KTO).

    A dialogue that ends with the human's turn is a prompt.
    """

    def convert(row: Row) -> Example:
        turns = turns_in(require(row, column), column)
        if not any(speaker == "Human" for speaker, _ in turns):
            raise RowError(f"`{column}` has no human turn")
        if turns[-1][0] != "Assistant":
            return answered(turns)
        return _labelled(row, answered(turns[:-1], _last_answer(turns, column)))

    return convert


def prompt_and(column: str) -> Callable[[Row], Example]:
    """A prompt and one response in `column`, wanted or unwanted according to a `label` (KTO): text, or chat turns.

    Turns beside a prompt that is text follow it, unless they are a whole dialogue, which repeats it.
    """

    def convert(row: Row) -> Example:
        if isinstance(require(row, "prompt"), list | dict):
            context, answer = turns_in(row["prompt"], "prompt"), turns_in(require(row, column), column)
            return _labelled(row, answered(context, _last_answer(answer, column)))
        if isinstance(require(row, column), list | dict):
            turns = turns_in(row[column], column)
            if not any(speaker == "Human" for speaker, _ in turns):
                turns = [("Human", text_in(row, "prompt")), *turns]
            return _labelled(row, answered(turns[:-1], _last_answer(turns, column)))
        return _labelled(row, undecided(text_in(row, "prompt"), response_in(row, column)))

    return convert


def _labelled(row: Row, example: Example) -> Example:
    if "label" not in row:
        return example
    label = LABELS.get(str(row["label"]).lower())
    if label is None:
        raise RowError(f"`label` must be true or false, found {_describe(row['label'])}")
    chosen, rejected = (example.chosen, None) if label else (None, example.chosen)
    return replace(example, chosen=chosen, rejected=rejected, label=label)


def prompt_only(row: Row) -> Example:
    """A prompt without a response: text, or chat turns that end with the human's."""
    if isinstance(require(row, "prompt"), list | dict):
        turns = turns_in(row["prompt"], "prompt")
        if turns[-1][0] == "Assistant":
            raise RowError("`prompt` must end with a turn of the human's, found one of the assistant's")
        return answered(turns)
    return undecided(text_in(row, "prompt"))


def plain_text(row: Row) -> Example:
    """Text to be learned as a whole: every token is trained, the prompt is empty."""
    if isinstance(require(row, "text"), str) and not row["text"].strip():
        raise DroppedRow("with blank text")
    return Example("", text_in(row, "text"))
