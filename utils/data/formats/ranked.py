"""Rows with several answers to one prompt, ranked by scores or ranks, or given best first (see `converters`)."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from utils.data.formats.converters import number_in, require, response_in, text_in, turns_in
from utils.data.formats.dialogue import answered, asked, turns_of, undecided
from utils.data.formats.example import Example, NoResponseError, Row, RowError, Turn

Ranked = Sequence[tuple[str, float]]
_HELPSTEER_MARKER = re.compile(r"<extra_id_1>(User|Assistant)\n")


def with_ranked(example: Example, ranked: Ranked) -> Example:
    """`example`, a prompt, with answers; `chosen` is the first of the best ones, `rejected` the last of the worst.

    There is no `rejected` where all are equally good.

    Args:
        ranked: each answer and a number that is higher the better it is; at least one.
    """
    best = max(ranked, key=lambda answer: answer[1])
    worst = min(reversed(ranked), key=lambda answer: answer[1])
    rejected = worst[0] if worst[1] < best[1] else None
    return replace(example, chosen=best[0], rejected=rejected, ranked=tuple(ranked))


def ranked_answers(
    column: str, numbers: str | None = None, *, lower_is_better: bool = False
) -> Callable[[Row], Example]:
    """A prompt, text or chat turns, and a list of answers in `column`, each of them text or chat turns.

    An answer's turns are the assistant's one, or a whole dialogue that repeats the prompt.

    Args:
        numbers: column with a list of the answers' scores or ranks; None: the answers are in order, best first.
        lower_is_better: the numbers are ranks.
    """

    def convert(row: Row) -> Example:
        prompt, answers = require(row, "prompt"), _list_in(row, column)
        if numbers is None:
            scores = [-float(place) for place in range(len(answers))]
        else:
            values = _list_in(row, numbers)
            if len(values) != len(answers):
                raise RowError(f"`{column}` has {len(answers)} answers and `{numbers}` {len(values)} numbers")
            scores = [_number(value, f"{numbers}[{place}]") for place, value in enumerate(values)]
            scores = [-score for score in scores] if lower_is_better else scores
        turns = turns_in(prompt, "prompt") if isinstance(prompt, list | dict) else [("Human", text_in(row, "prompt"))]
        names = [f"{column}[{place}]" for place in range(len(answers))]
        texts = [_answer(answer, name, turns) for answer, name in zip(answers, names, strict=True)]
        if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
            return with_ranked(undecided(prompt), list(zip(texts, scores, strict=True)))
        return with_ranked(answered(turns), _stripped(zip(texts, scores, strict=True)))

    return convert


def _list_in(row: Row, column: str) -> list[Any]:
    values = require(row, column)
    if not isinstance(values, list):
        raise RowError(f"`{column}` must be a list, found {type(values).__name__}")
    if not values:
        raise NoResponseError(f"has no response: `{column}` is empty")
    return values


def _number(value: Any, name: str) -> float:
    number = math.nan if isinstance(value, bool) else number_in({name: value}, name)
    if not math.isfinite(number):
        raise RowError(f"`{name}` must be a finite number, found {value!r}")
    return number


def _answer(value: Any, name: str, prompt: Sequence[Turn]) -> str:
    if not isinstance(value, list | dict):
        return response_in({name: value}, name)
    *context, (speaker, text) = turns_in(value, name)
    if speaker != "Assistant" or not text.strip():
        raise NoResponseError(f"has no response: `{name}` does not end with an answer of the assistant's")
    if context and context != list(prompt):
        raise RowError(f"`{name}` has turns in front of its answer that are not those of `prompt`")
    return text


def _stripped(ranked) -> list[tuple[str, float]]:
    return [(text.strip(), score) for text, score in ranked]


def scored_list(
    column: str, answer: str, scores: Sequence[str], prompt: str, *, sign: int = 1
) -> Callable[[Row], Example]:
    """A published set's list of answers in `column`, each a mapping with the text in `answer` and a number.

    Answers without text, or without a number, are left out: the annotation of some has failed.

    Args:
        scores: names of the number, of which the first one that a row has counts for all of its answers.
        prompt: column with the question, or with the text of a dialogue up to "Assistant:".
        sign: -1 where the numbers are ranks.
    """

    def convert(row: Row) -> Example:
        entries = require(row, column)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise RowError(f"`{column}` must be a list of answers with `{answer}` and `{scores[0]}`")
        answers = [entry for entry in entries if isinstance(entry.get(answer), str) and entry[answer].strip()]
        score = next((name for name in scores if any(_is_number(entry.get(name)) for entry in answers)), scores[0])
        ranked = [(each[answer], sign * float(each[score])) for each in answers if _is_number(each.get(score))]
        if not ranked:
            raise NoResponseError(f"has no response: `{column}` has no answer with a number")
        question = text_in(row, prompt)
        turns = turns_of(question)
        return with_ranked(asked(question) if turns is None else answered(turns), _stripped(ranked))

    return convert


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def helpsteer(row: Row) -> Example:
    """nvidia/HelpSteer and HelpSteer2: an answer with scores; later turns of a prompt begin with `<extra_id_1>`."""
    first, *pieces = _HELPSTEER_MARKER.split(text_in(row, "prompt"))
    speakers = {"User": "Human", "Assistant": "Assistant"}
    turns = [("Human", first), *((speakers[pieces[i]], pieces[i + 1]) for i in range(0, len(pieces), 2))]
    return answered(turns, response_in(row, "response"))
