"""From a row of a published data set, in that set's own columns, to an `Example` (see `converters`)."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from utils.data.formats.converters import number_in, require, response_in, text_in, turns_in
from utils.data.formats.dialogue import answered, asked, with_turns
from utils.data.formats.example import DroppedRow, Example, NoResponseError, Row, RowError, Turn
from utils.errors import InputError

_CITATION = re.compile(r" ?[(\[][^)\]]*[)\]]")
Located = tuple[str, Row]


def as_it_stands(row: Row) -> Example:
    """Dahoas' sets: prompt ends with "Assistant:", the responses begin with a space; nothing is changed."""
    return with_turns(Example(text_in(row, "prompt"), response_in(row, "chosen"), response_in(row, "rejected")))


def asked_pair(row: Row) -> Example:
    """A bare question with two bare answers in prompt/chosen/rejected."""
    return asked(text_in(row, "prompt"), response_in(row, "chosen"), response_in(row, "rejected"))


def question_and_answer(question: str, answer: str) -> Callable[[Row], Example]:
    """A bare question and a bare answer in two columns."""
    return lambda row: asked(text_in(row, question), response_in(row, answer))


def reward_datasets(row: Row) -> Example:
    """yitingxie/rlhf-reward-datasets: the responses begin with the marker "Assistant:" that the prompt lacks."""
    prompt = text_in(row, "prompt") + "Assistant:"
    answers = [response_in(row, column).split("Assistant:")[-1] for column in ("chosen", "rejected")]
    if not all(answer.strip() for answer in answers):
        raise NoResponseError("has no response after `Assistant:`")
    return with_turns(Example(prompt, *answers))


def summarize_comparisons(row: Row) -> Example:
    """CarperAI/openai_summarize_comparisons: the summaries begin with the "TL;DR:" that asks for them."""
    answers = [response_in(row, column).strip().removeprefix("TL;DR:") for column in ("chosen", "rejected")]
    return asked(text_in(row, "prompt").rstrip() + "\nTL;DR:", *answers)


def webgpt_comparisons(row: Row) -> Example:
    """openai/webgpt_comparisons: scores in [-1, 1] that sum to 0 (0 is a tie); "[1]" citations are removed."""
    question = require(row, "question")
    if not isinstance(question, dict):
        raise RowError("`question` must hold full_text")
    scores = number_in(row, "score_0"), number_in(row, "score_1")
    answers = [_CITATION.sub("", response_in(row, column)) for column in ("answer_0", "answer_1")]
    if scores[0] == scores[1]:
        raise DroppedRow("with a tie")
    return asked(text_in(question, "full_text"), *(answers if scores[0] > scores[1] else reversed(answers)))


def human_preferences(row: Row) -> Example:
    """stanfordnlp/SHP: `labels` is 1 where human_ref_A is preferred, else 0."""
    answers = [response_in(row, column) for column in ("human_ref_A", "human_ref_B")]
    return asked(text_in(row, "history"), *(answers if number_in(row, "labels") == 1 else reversed(answers)))


def safe_rlhf(row: Row) -> Example:
    """PKU-Alignment/PKU-SafeRLHF: `better_response_id` is the number of the more helpful response, 0 or 1."""
    answers = [response_in(row, column) for column in ("response_0", "response_1")]
    better = number_in(row, "better_response_id")
    if better not in (0, 1):
        raise RowError(f"`better_response_id` must be 0 or 1, found {better:g}")
    return asked(text_in(row, "prompt"), *(answers if better == 0 else reversed(answers)))


def system_and_question(system: str, question: str, *answers: str) -> Callable[[Row], Example]:
    """A system prompt, which may be empty, a bare question, and one or two bare answers, in columns of these names.

    A `status` of "tie" (argilla/distilabel-intel-orca-dpo-pairs) says that a judge saw no difference.
    """

    def convert(row: Row) -> Example:
        instruction = require(row, system) or ""
        turns = [("System", text_in(row, system))] if instruction != "" else []
        turns.append(("Human", text_in(row, question)))
        texts = [response_in(row, column) for column in answers]
        if row.get("status") == "tie":
            raise DroppedRow("with a tie")
        return answered(turns, *texts)

    return convert


def instruction_in_context(row: Row) -> Example:
    """databricks/databricks-dolly-15k: a context that is not empty follows the instruction on a separate line."""
    question = text_in(row, "instruction")
    if require(row, "context"):
        question += f"\n{text_in(row, 'context')}"
    return asked(question, response_in(row, "response"))


def context_messages(row: Row) -> Example:
    """OpenRLHF/prompt-collection-v0.1: chat turns that end with the human's."""
    turns = turns_in(require(row, "context_messages"), "context_messages")
    if turns[-1][0] == "Assistant":
        raise DroppedRow("that end with the assistant's turn")
    return answered(turns)


def vicuna(row: Row) -> Example:
    """pvduy/sharegpt_alpaca_oa_vicuna_format: "USER: ... ASSISTANT:" in prompt, the answer in label."""
    prompt = text_in(row, "prompt").replace("USER:", "Human:").replace("ASSISTANT:", "Assistant:")
    return with_turns(Example(prompt, " " + response_in(row, "label").strip()))


def passages(row: Row) -> Example:
    """Cohere/miracl: the first relevant passage against the first irrelevant one, where there is one."""
    chosen, rejected = (require(row, column) for column in ("positive_passages", "negative_passages"))
    if not chosen:
        raise NoResponseError("has no response: `positive_passages` is empty")
    return asked(
        text_in(row, "query"), response_in(chosen[0], "text"), response_in(rejected[0], "text") if rejected else None
    )


def first_human_answer(row: Row) -> Example:
    """Hello-SimpleAI/HC3: the first of the answers written by people."""
    return asked(text_in(row, "question"), _first(require(row, "human_answers"), "human_answers"))


def first_question(row: Row) -> Example:
    """lmqg/qag_jaquad: the first question asked of a paragraph, answered by the paragraph."""
    return asked(_first(require(row, "questions"), "questions"), response_in(row, "paragraph"))


def _first(values: Any, column: str) -> str:
    if not isinstance(values, Sequence) or not values or not isinstance(values[0], str) or not values[0].strip():
        raise NoResponseError(f"has no response: `{column}` has no text")
    return values[0]


def translated_question(language: str) -> Callable[[Row], Example]:
    """apple/mkqa: the query in `language` and its first answer's text (null where the question has no answer)."""

    def convert(row: Row) -> Example:
        answers = require(row, "answers").get(language) or [{"text": None}]
        return asked(text_in(require(row, "queries"), language), response_in(answers[0], "text"))

    return convert


def scored_responses(row: Row) -> Example:
    """GPT-4-LLM's comparison data: several scored responses, the best against the worst."""
    responses = require(row, "responses_and_scores")
    if not isinstance(responses, Sequence) or not responses:
        raise NoResponseError("has no response: `responses_and_scores` is empty")
    ranked = sorted(responses, key=lambda response: number_in(response, "score"), reverse=True)
    best, worst = ranked[0], ranked[-1]
    if number_in(best, "score") == number_in(worst, "score"):
        raise DroppedRow("with a tie")
    example = asked(text_in(row, "user_input"), response_in(best, "response"), response_in(worst, "response"))
    texts = ((entry.get("response"), float(entry["score"])) for entry in responses)
    return replace(example, ranked=tuple((text.strip(), score) for text, score in texts if text and text.strip()))


def message_trees(rows: Iterable[Located]) -> Iterator[tuple[str, Example]]:
    """OpenAssistant/oasst1 and oasst2: one example for each prompter's message with replies.

    The reply ranked best is preferred to the one ranked worst, and all ranked ones are kept. Each row is one message of
    a tree (message_id, parent_id, role, text, rank from 0 = best, deleted).
    """
    messages: dict[str, Located] = {}
    replies: dict[str, list[Row]] = {}
    for where, row in rows:
        if row.get("deleted"):
            continue
        for column in ("message_id", "role", "text"):
            if not isinstance(row.get(column), str):
                raise InputError(f"{where}: `{column}` must be text")
        messages[row["message_id"]] = (where, row)
        if row["role"] == "assistant" and row.get("parent_id"):
            replies.setdefault(row["parent_id"], []).append(row)
    for parent_id, answers in replies.items():
        turns = _path_to_root(parent_id, messages)
        if turns is None:
            continue
        answers.sort(key=lambda answer: answer["rank"] if answer.get("rank") is not None else len(answers))
        rejected = answers[-1] if len(answers) > 1 and answers[-1].get("rank") is not None else None
        texts = [answer["text"] for answer in (answers[0], rejected) if answer is not None]
        ranked = [
            (answer["text"].strip(), -float(answer["rank"])) for answer in answers if answer.get("rank") is not None
        ]
        example = answered(turns, *texts)
        yield messages[parent_id][0], example if rejected is None else replace(example, ranked=tuple(ranked))


def _path_to_root(message_id: str | None, messages: dict[str, Located]) -> list[Turn] | None:
    """The turns from the tree's root to `message_id`; None where one of them was deleted."""
    turns: list[Turn] = []
    while message_id is not None:
        if message_id not in messages:
            return None
        row = messages[message_id][1]
        turns.append(("Assistant" if row["role"] == "assistant" else "Human", row["text"]))
        message_id = row.get("parent_id")
    return turns[::-1]
