"""The world's rows: deterministic, held-out questions nowhere in training, each part of the pairs as described."""

import random

from utils.toy.facts import FACTS, RELATIONS
from utils.toy.judge import judge
from utils.toy.world import (
    QUALITIES,
    TIERS,
    dialogue_prompt,
    make_answer,
    make_questions,
    preference_rows,
    pretraining_rows,
    sft_rows,
)


def question_of(row):
    return row["prompt"].removeprefix(" Human: ").removesuffix(" Assistant:")


def test_held_out_questions_are_new_combinations_of_known_parts():
    for seed in range(3):
        training, held_out = make_questions(seed)
        combinations = {(question.fact, question.phrasing) for question in training}
        assert not combinations & {(question.fact, question.phrasing) for question in held_out}
        assert {question.fact for question in training} == {question.fact for question in held_out} == set(FACTS)
        for relation in RELATIONS.values():
            asked = {q.phrasing for q in training if q.fact.relation == relation.name}
            assert asked == set(range(len(relation.questions)))


def test_no_training_row_of_any_stage_holds_a_held_out_question():
    training, held_out = make_questions(5)
    makers = (pretraining_rows, sft_rows, preference_rows)
    rows = [row for make in makers for row in make(random.Random(0), training, 400)]
    text = "\n".join(" ".join(row.values()) for row in rows)
    assert any(question.text in text for question in training)
    assert not [question.text for question in held_out if question.text in text]


def test_same_seed_same_rows_other_seed_other_rows():
    questions, _ = make_questions(1)
    for make in (pretraining_rows, sft_rows, preference_rows):
        assert make(random.Random("a"), questions, 50) == make(random.Random("a"), questions, 50)
        assert make(random.Random("a"), questions, 50) != make(random.Random("b"), questions, 50)
    assert make_questions(1) == make_questions(1) != make_questions(2)


def test_facts_of_a_relation_differ_in_every_object():
    for relation in RELATIONS:
        objects = [fact.object for fact in FACTS if fact.relation == relation]
        assert len(set(objects)) == len(objects)


def test_pretraining_text_states_every_fact_and_nothing_false():
    rows = pretraining_rows(random.Random(0), make_questions(0)[0], 600)
    text = " ".join(row["text"] for row in rows)
    for fact in FACTS:
        forms = [form.format(s=fact.subject, o=fact.object) for form in RELATIONS[fact.relation].statements]
        assert all(form in text for form in forms)
    question = RELATIONS[FACTS[0].relation].questions[0].format(s=FACTS[0].subject)
    assert judge(question, text.replace("Answer:", ".")).kind != "wrong"


def test_supervised_rows_are_of_mixed_quality():
    rows = sft_rows(random.Random(0), make_questions(0)[0], 2000)
    scores = [judge(question_of(row), row["chosen"]).score for row in rows]
    assert 0.3 < sum(scores) / len(scores) < 0.45
    assert sum(score == 1.0 for score in scores) > 300


def test_pairs_prefer_the_better_answer_and_hold_both_lessons():
    rows = preference_rows(random.Random(0), make_questions(0)[0], 2000)
    verdicts = [(judge(question_of(row), row["chosen"]), judge(question_of(row), row["rejected"])) for row in rows]
    agreeing = sum(chosen.score > rejected.score for chosen, rejected in verdicts)
    assert agreeing / len(rows) > 0.9
    for kind in ("wrong", "off_question"):
        lessons = sum((chosen.kind, rejected.kind) == ("helpful", kind) for chosen, rejected in verdicts)
        assert lessons >= len(rows) // 5


def test_chosen_and_rejected_differ():
    rows = preference_rows(random.Random(3), make_questions(0)[0], 2000)
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_every_quality_is_in_one_tier():
    assert len(set(QUALITIES)) == len(QUALITIES) == sum(map(len, TIERS))
    rng = random.Random(0)
    assert all(make_answer(rng, fact, quality) for fact in FACTS for quality in QUALITIES)


def test_text_form():
    assert dialogue_prompt("Who?") == " Human: Who? Assistant:"
