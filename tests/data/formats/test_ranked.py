"""Rows with several answers: their scores or ranks, and what is refused."""

import pytest

from utils.data.formats.example import DroppedRow, NoResponseError, RowError, check_usable
from utils.data.formats.registry import find_format

ANSWERS = ["bad", "good", "fair"]


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def convert(row: dict):
    return find_format(row, "preference").convert(row)


@pytest.mark.parametrize(
    "columns",
    [
        {"responses": ANSWERS, "scores": [1, 9.5, "3"]},
        {"responses": ANSWERS, "ranks": [3, 1, 2]},
        {"ranked_responses": ["good", "fair", "bad"]},
    ],
)
def test_scores_are_higher_and_ranks_lower_the_better_and_order_is_best_first(columns):
    example = convert({"prompt": "Why?", **columns})
    assert (example.prompt, example.chosen, example.rejected, example.is_undecided) == ("Why?", "good", "bad", True)
    assert [text for text, _ in sorted(example.ranked, key=lambda answer: -answer[1])] == ["good", "fair", "bad"]


def test_answers_may_be_turns_alone_or_whole_dialogues():
    turns = (("Human", "Hi"), ("Assistant", "Yo."), ("Human", "Why?"))
    for responses in (
        [chat("", answer)[1:] for answer in ANSWERS],
        [chat("", answer)[1] for answer in ANSWERS],
        [chat("Hi", "Yo.", "Why?", answer) for answer in ANSWERS],
        ANSWERS,
    ):
        example = convert({"prompt": chat("Hi", "Yo.", "Why?"), "responses": responses, "scores": [0, 2, 1]})
        assert example.prompt == turns
        assert example.ranked == (("bad", 0.0), ("good", 2.0), ("fair", 1.0))
    with pytest.raises(RowError, match=r"`responses\[1\]` has turns in front of its answer that are not those of"):
        convert({"prompt": chat("Hi"), "responses": ["a", chat("Hello", "b")], "scores": [1, 2]})


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"responses": ANSWERS, "scores": [1, 2]}, RowError, "`responses` has 3 answers and `scores` 2 numbers"),
        ({"responses": ["a", "b"], "scores": [1, None]}, RowError, r"`scores\[1\]` must be a number, found null"),
        ({"responses": ["a", "b"], "ranks": [1, True]}, RowError, r"`ranks\[1\]` must be a finite number, found True"),
        ({"responses": ["a", "b"], "scores": [1, float("nan")]}, RowError, r"`scores\[1\]` must be a finite number"),
        ({"responses": ["a", " "], "scores": [1, 2]}, NoResponseError, r"`responses\[1\]` is empty"),
        ({"responses": "ab", "scores": [1, 2]}, RowError, "`responses` must be a list, found str"),
        ({"ranked_responses": []}, NoResponseError, "`ranked_responses` is empty"),
    ],
)
def test_rows_that_cannot_be_ranked_are_refused(columns, error, message):
    with pytest.raises(error, match=message):
        convert({"prompt": "Why?", **columns})


@pytest.mark.parametrize(
    ("scores", "reason"), [([2, 2, 2], "with a tie"), ([2], "with a single answer"), ([2, 2, 1], None)]
)
def test_ties_and_single_answers_serve_every_step_but_this_one(scores, reason):
    example = convert({"prompt": "Why?", "responses": ANSWERS[: len(scores)], "scores": scores})
    assert example.chosen == "bad"
    check_usable(example, "sft")
    if reason:
        with pytest.raises(DroppedRow, match=reason):
            check_usable(example, "preference")
    else:
        assert example.rejected == "fair"
