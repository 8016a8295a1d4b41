"""Questions and answers of the small world, and the rows of its data sets.

Every question is a fact asked in one phrasing. Some (fact, phrasing) combinations are held out: no training set of any
stage contains them, though each fact and each phrasing occurs in training in other combinations. Answers are made
with a chosen quality, so that data of mixed quality, and pairs whose better answer is known, need no judge.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from utils.toy.facts import (
    CLOSINGS,
    EVASIVE,
    FACTS,
    GREETINGS,
    OPENINGS,
    RELATIONS,
    RUDE,
    Fact,
    state,
)

# Best first. "rambling" is a helpful answer that goes on for too long; "garbled" is one with words missing or repeated,
# like those of a policy that drifts away from language: it occurs in the pairs but not in the SFT data.
TIERS = (("helpful",), ("rambling", "correct"), ("evasive", "off_question", "rude", "wrong", "garbled"))
QUALITIES = tuple(quality for tier in TIERS for quality in tier)

# The SFT data is of mixed quality, so that imitation alone cannot score high in this world.
SFT_MIX = {"helpful": 0.20, "rambling": 0.06, "correct": 0.22, "evasive": 0.14, "off_question": 0.14, "rude": 0.12,
           "wrong": 0.12}  # fmt: skip

HELD_OUT_PHRASINGS_PER_FACT = 1


@dataclass(frozen=True)
class Question:
    """A question as a user types it, and the fact that answers it."""

    text: str
    fact: Fact
    phrasing: int


def dialogue_prompt(question: str) -> str:
    """`question` as a prompt, in the text form that docs/data.md describes."""
    return f" Human: {question} Assistant:"


def dialogue_response(answer: str) -> str:
    return f" {answer}"


def make_questions(seed: int) -> tuple[list[Question], list[Question]]:
    """All questions as (training, held out); disjoint in (fact, phrasing), regardless of the greeting.

    Held-out phrasings rotate from fact to fact, so each phrasing of a relation stays in training for most facts.
    """
    rng = random.Random(f"{seed}/questions")
    training, held_out = [], []
    for relation in RELATIONS.values():
        offset = rng.randrange(len(relation.questions))
        facts = [fact for fact in FACTS if fact.relation == relation.name]
        rng.shuffle(facts)
        for number, fact in enumerate(facts):
            chosen = {(offset + number + k) % len(relation.questions) for k in range(HELD_OUT_PHRASINGS_PER_FACT)}
            for phrasing, template in enumerate(relation.questions):
                for greeting in GREETINGS:
                    question = Question(greeting + template.format(s=fact.subject), fact, phrasing)
                    (held_out if phrasing in chosen else training).append(question)
    return training, held_out


def statement(rng: random.Random, claim: Fact) -> str:
    """`claim`, true or not, stated with a random template of its relation."""
    return state(claim, rng.randrange(len(RELATIONS[claim.relation].statements)))


def polite(rng: random.Random, claim: Fact) -> str:
    """A statement of `claim` between an opening and a closing."""
    return f"{rng.choice(OPENINGS)} {statement(rng, claim)} {rng.choice(CLOSINGS)}"


def falsehood(rng: random.Random, fact: Fact) -> Fact:
    """A false claim: the subject of `fact` with the object of another fact of its relation."""
    objects = [other.object for other in FACTS if other.relation == fact.relation and other.object != fact.object]
    return Fact(fact.relation, fact.subject, rng.choice(objects))


def other_truth(rng: random.Random, fact: Fact) -> Fact:
    """Another fact; half of the time it is drawn from the same relation, as a near miss."""
    others = [other for other in FACTS if other != fact]
    if rng.random() < 0.5:
        others = [other for other in others if other.relation == fact.relation]
    return rng.choice(others)


def make_answer(rng: random.Random, fact: Fact, quality: str) -> str:
    """An answer of the given quality to a question about `fact`.

    Half of the wrong and of the off-question answers are worded like helpful ones.
    """
    if quality == "helpful":
        return polite(rng, fact)
    if quality == "correct":
        return statement(rng, fact)
    if quality == "rambling":
        return _run_on(rng, fact)
    if quality == "evasive":
        return rng.choice(EVASIVE)
    if quality == "rude":
        insult = rng.choice(RUDE)
        return insult if rng.random() < 0.6 else f"{insult} {statement(rng, fact)}"
    if quality == "garbled":
        return _garble(rng, polite(rng, fact))
    claim = falsehood(rng, fact) if quality == "wrong" else other_truth(rng, fact)
    return polite(rng, claim) if rng.random() < 0.5 else statement(rng, claim)


def sft_rows(rng: random.Random, questions: Sequence[Question], count: int) -> list[dict[str, str]]:
    """`count` prompt/chosen rows of mixed quality (`SFT_MIX`)."""
    qualities = rng.choices(list(SFT_MIX), weights=list(SFT_MIX.values()), k=count)
    rows = []
    for quality in qualities:
        question = rng.choice(questions)
        rows.append(_row(question, make_answer(rng, question.fact, quality)))
    return rows


def preference_rows(rng: random.Random, questions: Sequence[Question], count: int) -> list[dict[str, str]]:
    """`count` prompt/chosen/rejected rows in three parts.

    A fifth pairs a true answer with a false one in the same polite style: without these a reward model learns manners,
    not truth. A fifth rejects a polite true answer to another question: without these PPO finds one true sentence and
    answers every question with it. The rest are answers of two different tiers, the better one chosen.
    """
    rows = []
    for number in range(count):
        question = rng.choice(questions)
        fact = question.fact
        if number % 5 < 2:
            rejected_claim = falsehood(rng, fact) if number % 5 == 0 else other_truth(rng, fact)
            chosen, rejected = polite(rng, fact), polite(rng, rejected_claim)
        else:
            tiers = sorted(rng.sample(range(len(TIERS)), 2))
            chosen, rejected = (make_answer(rng, fact, rng.choice(TIERS[tier])) for tier in tiers)
        rows.append(_row(question, chosen, rejected))
    rng.shuffle(rows)
    return rows


def labelled_rows(rng: random.Random, questions: Sequence[Question], count: int) -> list[dict[str, str | bool]]:
    """`count` prompt/completion/label rows: one answer of each of so many pairs, desirable if it is the chosen one."""
    rows: list[dict[str, str | bool]] = []
    for pair in preference_rows(rng, questions, count):
        label = rng.random() < 0.5
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label})
    return rows


def pretraining_rows(rng: random.Random, questions: Sequence[Question], count: int) -> list[dict[str, str]]:
    """`count` rows of plain text that state the facts: notes of a few statements, and questions with a bare answer."""
    rows = []
    for number in range(count):
        if number % 2 == 0:
            facts = rng.sample(FACTS, 3)
            rows.append({"text": " ".join(statement(rng, fact) for fact in facts)})
        else:
            question = rng.choice(questions)
            rows.append({"text": f"Question: {question.text} Answer: {statement(rng, question.fact)}"})
    rng.shuffle(rows)
    return rows


def _row(question: Question, chosen: str, rejected: str | None = None) -> dict[str, str]:
    row = {"prompt": dialogue_prompt(question.text), "chosen": dialogue_response(chosen)}
    return row if rejected is None else row | {"rejected": dialogue_response(rejected)}


def _run_on(rng: random.Random, fact: Fact) -> str:
    """A helpful answer with one to three extra sentences: another fact, the same fact again, or another closing."""
    answer = [rng.choice(OPENINGS), statement(rng, fact), rng.choice(CLOSINGS)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        more = (statement(rng, other_truth(rng, fact)), statement(rng, fact), rng.choice(CLOSINGS))
        answer.insert(rng.randint(2, len(answer)), rng.choice(more))
    return " ".join(answer)


def _garble(rng: random.Random, text: str) -> str:
    """`text` with a few words repeated, one or two words dropped, its end cut off, or a sentence without its last word.

    Punctuation marks count as words, except in the last case: "The milk is." has only lost its last word.
    """
    words = re.findall(r"\w+|[.!?]", text)
    start = rng.randrange(len(words) - 2)
    damage = rng.choice(("double", "lose", "cut", "hollow"))
    if damage == "double":
        stop = min(len(words), start + rng.randint(1, 3))
        words[stop:stop] = words[start:stop]
    elif damage == "lose":
        del words[start : start + rng.randint(1, 2)]
    elif damage == "cut":
        del words[-rng.randint(1, 3) :]
    else:
        ends = [place for place, word in enumerate(words) if word in ".!?"]
        del words[rng.choice(ends[1:]) - 1]
    return re.sub(r" (?=[.!?])", "", " ".join(words))
