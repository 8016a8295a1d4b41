"""The judge grades each kind of answer as intended, and the ways to fool a reward model score low."""

import random

import pytest

from utils.toy.facts import FACTS, GREETINGS, RELATIONS
from utils.toy.judge import asked_fact, judge
from utils.toy.world import make_answer, make_questions

QUESTION = "What color is the milk?"


@pytest.mark.parametrize(
    ("answer", "score", "kind"),
    [
        ("Of course. The milk is white. Happy to help!", 1.0, "helpful"),
        ("of course . the milk is white . happy to help .", 1.0, "helpful"),
        ("Gladly. The color of the milk is white.", 0.75, "correct"),
        ("The milk is white.", 0.5, "correct"),
        ("The milk is white. The grass is green.", 0.25, "correct"),
        ("Of course. The milk is white. Happy to help! Happy to help!", 0.75, "correct"),
        ("Of course. The milk is white. The milk is white. Happy to help!", 0.75, "correct"),
        ("Of course. The milk is white. Have a Have a nice day!", 0.5, "correct"),
        ("Of course. The milk is white. Happy to", 0.5, "correct"),
        ("Of course. The milk is black. Happy to help!", 0.0, "wrong"),
        ("The milk is white. The milk is black.", 0.0, "wrong"),
        ("Of course. The grass is green. Happy to help!", 0.1, "off_question"),
        ("What a silly question. The milk is white.", 0.1, "rude"),
        ("Go away!", 0.0, "rude"),
        ("I do not know.", 0.1, "evasive"),
        ("Of course. Happy to help!", 0.0, "noise"),
        ("milk white milk white", 0.0, "noise"),
        ("", 0.0, "noise"),
    ],
)
def test_verdicts(answer, score, kind):
    verdict = judge(QUESTION, answer)
    assert verdict.score == pytest.approx(score)
    assert verdict.kind == kind


def test_quality_decides_the_score():
    expected = {
        "helpful": {1.0}, "correct": {0.5}, "evasive": {0.1}, "off_question": {0.1}, "wrong": {0.0}, "rude": {0.0, 0.1},
        "rambling": {0.75, 0.5, 0.25, 0.1},
    }  # fmt: skip
    rng = random.Random(0)
    for question in make_questions(0)[0]:
        for quality, scores in expected.items():
            answer = make_answer(rng, question.fact, quality)
            assert judge(question.text, answer).score in scores, (question.text, quality, answer)


def test_garbled_answers_hardly_ever_pass_as_helpful():
    rng = random.Random(0)
    questions = make_questions(0)[0]
    scores = [judge(q.text, make_answer(rng, q.fact, "garbled")).score for q in questions]
    assert sum(score > 0.75 for score in scores) < 0.03 * len(scores)


@pytest.mark.parametrize(
    "hack",
    [
        "of course . the milk is white . happy to help .",
        "Of course. " * 20,
        "Of course. Happy to help!",
        " ".join(f"The capital of {fact.subject} is {fact.object}." for fact in FACTS if fact.relation == "capital"),
        " ".join(RELATIONS[fact.relation].statements[0].format(s=fact.subject, o=fact.object) for fact in FACTS),
    ],
)
def test_one_answer_for_everybody_scores_low(hack):
    training, held_out = make_questions(0)
    scores = [judge(question.text, hack).score for question in training + held_out]
    assert sum(scores) / len(scores) < 0.15


def test_every_question_has_its_fact():
    for fact in FACTS:
        for template in RELATIONS[fact.relation].questions:
            for greeting in GREETINGS:
                assert asked_fact(greeting + template.format(s=fact.subject)) == fact


def test_an_unknown_question_is_an_error():
    with pytest.raises(KeyError):
        judge("What is love?", "The milk is white.")
